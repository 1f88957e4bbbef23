"""`rayfuse status`, `verify`, `migrate`: progress of a run, integrity and version of its data."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.align.task import record_of_map
from rayfuse.capture.dtype import DTYPE_FILE, find_corrupt_dtype, repair_dtype
from rayfuse.config.addresses import has_secrets
from rayfuse.config.base import UserError
from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.config.text import show_on_one_line
from rayfuse.evaluate.results import find_corrupt_results
from rayfuse.merge.command import merge_recipe
from rayfuse.merge.stored import describe_started, verify_merges
from rayfuse.pipeline import STAGES, is_stage_done, run_recipe
from rayfuse.report.stage import find_corrupt_report
from rayfuse.run.failed_sources import describe_failed, drop_sources, plan_run
from rayfuse.run.layout import Layout
from rayfuse.run.made_models import DONE_FILE, find_faults
from rayfuse.run.segmentation import find_corrupt_records, write_segmentation
from rayfuse.runtime.console import PlainConsole, ProgressBars
from rayfuse.runtime.progress import Progress, ProgressEvent
from rayfuse.schema import SCHEMA_VERSION
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.files import find_corrupt
from rayfuse.storage.migrate import count_migrated, migrate_store
from rayfuse.storage.seal import ShardError
from rayfuse.storage.store import open_store
from rayfuse.storage.verify import (
    CorruptFile,
    Status,
    Verified,
    read_status,
    repair_data_set,
    to_json,
    verify_data_set,
)


def show_status(recipe: Recipe, console: Console) -> dict[str, Any]:
    """Print the progress of a recipe's run, and return it as plain values.

    Raises:
        UserError: The recipe cannot be used, or the store has another schema version.
        ShardError: A record is corrupt.
    """
    layout = plan_run(recipe, ALIGN_FACTS)
    statuses = read_statuses(layout)
    print_status(layout, statuses, console)
    merges = describe_started(drop_sources(recipe, layout.failed), layout)
    if merges is not None:
        console.print(f"{'merge':<9} {merges}", highlight=False)
    stages = {stage: is_stage_done(stage, layout) for stage in STAGES}
    failed = dict(layout.failed)
    found = {"stages": stages, "data_sets": list_numbers(statuses), "failed_sources": failed}
    return found | ({"merge": merges} if merges is not None else {})


def verify_recipe(
    recipe: Recipe, console: Console, *, repair: bool, file: str | None = None
) -> dict[str, Any]:
    """Check every shard of a recipe's run, repair it if wanted, and return the results.

    Args:
        recipe: The recipe.
        console: Where progress and results are printed.
        repair: Remove what is corrupt, and run the stages that write it again.
        file: The recipe's file, for hints.

    Raises:
        UserError: The recipe or its section `merge` cannot be used, or the store has another schema
            version.
    """
    segmentations = verify_segmentations(recipe)
    if repair:  # before the folders have names: a corrupt record of a segmentation hides them
        for fault in segmentations.corrupt:
            open_store(recipe.storage).remove(fault.file)
    layout = plan_run(recipe, ALIGN_FACTS)
    with ProgressBars(console) as bars:
        found = {"segmentations": segmentations} | verify_layout(layout, bars)
        merges = verify_merges(drop_sources(recipe, layout.failed), layout)
    print_verified(found | merges, console)
    if repair:
        for verified in merges.values():
            _remove_corrupt(layout, verified)
        complete = [stage for stage in STAGES if has_results(stage, layout)]
        corrupt = repair_layout(drop_sources(recipe, layout.failed), layout, found)
        # What is written again may have other bytes: then what was made from it is stale.
        stages = tuple(stage for stage in STAGES if stage in {*complete, *corrupt})
        if corrupt:
            run_recipe(recipe, stages, console, file=file)
        if merges and (corrupt or any(verified.corrupt for verified in merges.values())):
            merge_recipe(recipe, console, file=file)
    return {"data_sets": list_numbers(found | merges), "repaired": repair}


def migrate_storage(uri: str, console: Console | None = None) -> dict[str, Any]:
    """Migrate a store to the current schema version, print what was written, and return counts.

    Args:
        uri: The storage of a run: a folder or a URI.
        console: Where it is printed; nowhere by default.

    Raises:
        UserError: There is nothing to migrate, or a version that cannot be migrated; or the address
            contains credentials.
        ShardError: A run record is corrupt.
    """
    if has_secrets(uri):
        raise UserError("the storage's address contains credentials; use AWS_PROFILE and the like")
    store = open_store(uri)
    console = console or PlainConsole(None, quiet=True)
    with ProgressBars(console) as bars:
        migration = migrate_store(store, bars)
    for text in migration.corrupt:
        console.print(f"left as it is: {text}", highlight=False, style="red")
    console.print(
        f"{store.root} has schema version {SCHEMA_VERSION}: {migration.data_sets} data sets with "
        f"{migration.shards} shards migrated, {migration.files} other files, "
        f"{len(migration.corrupt)} corrupt",
        highlight=False,
    )
    return count_migrated(migration)


def has_results(stage: str, layout: Layout) -> bool:
    """Check whether a stage is complete, or was before a record of it became corrupt."""
    try:
        return is_stage_done(stage, layout)
    except ShardError:
        return True


@dataclass(frozen=True)
class RunDataSet:
    """A data set of a run, and the stage that writes it."""

    stage: str
    """As in `STAGES`."""
    data: DataSet

    @property
    def label(self) -> str:
        """Its name in tables, such as `capture mpt`."""
        if self.stage == "corpus":
            return self.data.name or "corpus"
        return f"{self.stage} {self.data.name}"


def list_data_sets(layout: Layout) -> list[RunDataSet]:
    """List a run's data sets in the order of the stages."""
    return [
        RunDataSet("corpus", layout.corpus),
        RunDataSet("corpus", layout.held_out),
        *(RunDataSet("capture", data) for data in layout.captured.values()),
        *(RunDataSet("align", data) for data in layout.aligned.values()),
    ]


def list_token_nll(layout: Layout) -> list[RunDataSet]:
    """List the data sets that evaluation computes the ensemble from."""
    return [RunDataSet("evaluate", data) for data in layout.evaluation.token_nll.values()]


def read_statuses(layout: Layout) -> dict[str, Status]:
    """Read the progress of each data set, by its label.

    Raises:
        ShardError: A record is corrupt.
        UserError: The store has another schema version.
    """
    manifest = layout.corpus.read_manifest()
    num_shards = manifest.num_shards if manifest else None
    return {
        part.label: read_status(part.data, num_shards if part.data.inputs else None)
        for part in list_data_sets(layout)
    }


def print_status(layout: Layout, statuses: dict[str, Status], console: Console) -> None:
    """Print a table of the data sets, and the state of the other stages."""
    table = Table("data set", "shards", "rows", "tokens", "rejected", "state")
    for name, status in statuses.items():
        total = "?" if status.num_shards is None else f"{status.num_shards}"
        table.add_row(
            name,
            f"{status.shards} of {total}",
            f"{status.rows:,}",
            f"{status.tokens:,}",
            "\n".join(
                f"{count}: {show_on_one_line(reason)}" for reason, count in status.rejects.items()
            )
            or "0",
            _describe_state(status),
        )
    console.print(table)
    for sentence in describe_failed(layout.failed):
        console.print(sentence, highlight=False)
    for stage in STAGES[3:]:
        console.print(f"{stage:<9} {'complete' if is_stage_done(stage, layout) else 'incomplete'}")


def _describe_state(status: Status) -> str:
    if status.is_complete:
        return "complete"
    if status.last_metrics is None:
        return "incomplete" if status.shards else "not started"
    ago = max(time.time() - status.last_metrics["time"], 0)
    rate = status.last_metrics["tokens_per_second"]
    return f"incomplete: {rate:,.0f} tokens/s, {ago:,.0f} s ago"


def verify_layout(layout: Layout, progress: Progress) -> dict[str, Verified]:
    """Read and check all that a run has stored; return the results by label.

    Raises:
        UserError: The store has another schema version.
    """
    found: dict[str, Verified] = {}
    for part in (*list_data_sets(layout), *list_token_nll(layout)):

        def report(done: int, total: int, label: str = part.label) -> None:
            progress(ProgressEvent("verify", label, done, total, "shards"))

        found[part.label] = verify_data_set(part.data, report)
    for label, (_, faults) in list_file_checks(layout).items():
        corrupt = [CorruptFile(file, reason) for file, reason in faults]
        found[label] = Verified(label, 0, corrupt, [])
    return found


def verify_segmentations(recipe: Recipe) -> Verified:
    """Check the records of segmentations, which decide the names of folders."""
    store = open_store(recipe.storage)
    corrupt = [CorruptFile(file, reason) for file, reason in find_corrupt_records(store)]
    return Verified("corpus", 0, corrupt, [])


def list_file_checks(layout: Layout) -> dict[str, tuple[str, Iterable[tuple[str, str]]]]:
    """List what a run has stored besides data sets: by label its stage, and its corrupt files."""
    store = layout.store
    checks: dict[str, tuple[str, Iterable[tuple[str, str]]]] = {
        f"map {name}": ("align", find_corrupt(store, record_of_map(file)))
        for name, file in layout.map_files.items()
    }
    checks |= {
        f"dtype of {name}": ("capture", find_corrupt_dtype(captured))
        for name, captured in layout.captured.items()
    }
    checks |= {f"train {run.name}": ("train", find_faults(layout, run)) for run in layout.runs}
    merged = layout.evaluation.merge.folder
    if merged is not None:
        checks["merged model"] = ("evaluate", find_corrupt(store, f"{merged}/{DONE_FILE}"))
    checks["scores"] = ("evaluate", find_corrupt_results(layout))
    checks["report"] = ("report", find_corrupt_report(layout))
    return checks


def repair_layout(recipe: Recipe, layout: Layout, found: dict[str, Verified]) -> list[str]:
    """Remove corrupt files, and return the stages that write them again.

    Args:
        recipe: The recipe, for run records that are corrupt.
        layout: The run.
        found: The results of `verify_layout`.
    """
    stages: list[str] = []
    for segmentation in (layout.corpus_documents, layout.held_out_documents):
        if layout.corpus.store.sizes(layout.corpus.folder, "run.json"):
            write_segmentation(layout.store, segmentation.segmentation)
    for captured in layout.captured.values():
        repair_dtype(captured)
    for label, (stage, _) in list_file_checks(layout).items():
        _remove_corrupt(layout, found[label])
        stages += [stage] if found[label].corrupt else []
    for part in (*list_data_sets(layout), *list_token_nll(layout)):
        run: dict[str, Any] = {"recipe": dump_recipe(recipe)}
        if part.data.inputs:
            run["source"] = part.data.name
        repair_data_set(part.data, found[part.label], run)
        if found[part.label].corrupt:
            stages.append(part.stage)
    return [stage for stage in STAGES if stage in stages]


def _remove_corrupt(layout: Layout, verified: Verified) -> None:
    """Remove corrupt files, and the records that list them: then their stage writes both again."""
    for fault in verified.corrupt:
        if fault.file.endswith(f"/{DTYPE_FILE}"):  # repaired already
            continue
        layout.store.remove(fault.file)
        stem = fault.file.removesuffix(".parquet")
        if fault.file.startswith("maps/"):
            layout.store.remove(f"{stem.removesuffix('.json')}.parquet")
            layout.store.remove(f"{stem.removesuffix('.json')}.json")
        folder = fault.file.partition("/model/")[0].removesuffix("/metrics.jsonl")
        if folder != fault.file:
            layout.store.remove(f"{folder}/{DONE_FILE}")


def print_verified(found: dict[str, Verified], console: Console) -> None:
    """Print the result of each data set, and each corrupt file."""
    for name, verified in found.items():
        state = f"{len(verified.corrupt)} CORRUPT" if verified.corrupt else "intact"
        left = f", {len(verified.orphans)} leftover files" if verified.orphans else ""
        checked = f"{verified.shards_checked} shards checked" if verified.shards_checked else "read"
        console.print(f"{name:<24} {checked}, {state}{left}", highlight=False)
        for fault in verified.corrupt:
            line = show_on_one_line(f"{fault.file}: {fault.reason}")
            console.print(f"  {line}", highlight=False, style="red")


def list_numbers(found: dict[str, Verified] | dict[str, Status]) -> dict[str, Any]:
    """Convert the results to plain values, by data set."""
    return {label: to_json(result) for label, result in found.items()}
