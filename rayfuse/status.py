"""`rayfuse status` and `rayfuse verify`: what a run holds, and whether it is sound."""

import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.pipeline import STAGES, is_stage_done
from rayfuse.run.layout import Layout
from rayfuse.runtime.progress import Progress
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.verify import (
    Status,
    Verified,
    forget_damages,
    read_status,
    to_json,
    verify_data_set,
)


@dataclass(frozen=True)
class RunDataSet:
    """A data set of a run, and the stage that writes it."""

    stage: str
    """As in `STAGES`."""
    data: DataSet
    corpus: DataSet | None = None
    """The data set whose rows it must hold, in the same order."""

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
        *(RunDataSet("capture", data, layout.corpus) for data in layout.captured.values()),
        *(RunDataSet("align", data, layout.corpus) for data in layout.aligned.values()),
    ]


def read_statuses(layout: Layout) -> dict[str, Status]:
    """Return how far each data set is.

    Raises:
        ShardError: A record is damaged.
    """
    manifest = layout.corpus.read_manifest()
    num_shards = manifest.num_shards if manifest else None
    return {
        part.label: read_status(part.data, None if part.corpus is None else num_shards)
        for part in list_data_sets(layout)
    }


def print_status(layout: Layout, statuses: dict[str, Status], console: Console) -> None:
    """Print a table of the data sets, and which stages are done."""
    table = Table("data set", "shards", "rows", "tokens", "rejected", "state")
    for name, status in statuses.items():
        total = "?" if status.num_shards is None else f"{status.num_shards}"
        table.add_row(
            name,
            f"{status.shards} of {total}",
            f"{status.rows:,}",
            f"{status.tokens:,}",
            "\n".join(f"{count}: {reason}" for reason, count in status.rejects.items()) or "0",
            _describe_state(status),
        )
    console.print(table)
    for stage in STAGES[3:]:
        console.print(f"{stage:<9} {'done' if is_stage_done(stage, layout) else 'not done'}")


def _describe_state(status: Status) -> str:
    if status.is_complete:
        return "whole"
    if status.last_metrics is None:
        return "begun" if status.shards else "not begun"
    ago = max(time.time() - status.last_metrics["time"], 0)
    rate = status.last_metrics["tokens_per_second"]
    return f"{rate:,.0f} tokens/s, heard of {ago:,.0f} s ago"


def verify_layout(layout: Layout, progress: Progress) -> dict[str, Verified]:
    """Read every shard of a run, and return what is wrong with each data set."""
    found: dict[str, Verified] = {}
    for part in list_data_sets(layout):

        def tell(done: int, total: int, label: str = part.label) -> None:
            progress(f"verify {label}", done, total, "shards")

        found[part.label] = verify_data_set(part.data, part.corpus, tell)
    return found


def forget_all_damages(recipe: Recipe, layout: Layout, found: dict[str, Verified]) -> list[str]:
    """Take away what is damaged, and return the stages that make it again."""
    stages: list[str] = []
    for part in list_data_sets(layout):
        run: dict[str, Any] = {"recipe": dump_recipe(recipe)}
        if part.corpus is not None:
            run["source"] = part.data.name
        forget_damages(part.data, found[part.label], run)
        if found[part.label].damages:
            stages.append(part.stage)
    return [stage for stage in STAGES if stage in stages]


def print_verified(found: dict[str, Verified], console: Console) -> None:
    """Print what was checked, and each thing that is wrong."""
    for name, verified in found.items():
        state = f"{len(verified.damages)} DAMAGED" if verified.damages else "sound"
        left = f", {len(verified.orphans)} leftover files" if verified.orphans else ""
        checked = f"{verified.shards_checked} shards checked"
        console.print(f"{name:<24} {checked}, {state}{left}", highlight=False)
        for damage in verified.damages:
            console.print(f"  {damage.file}: {damage.reason}", highlight=False, style="red")


def list_numbers(found: dict[str, Verified] | dict[str, Status]) -> dict[str, Any]:
    """Return plain values by data set."""
    return {name: to_json(each) for name, each in found.items()}
