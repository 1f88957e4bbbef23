"""The stages of a run in order, and which of them are complete.

The stages are imported as they run: they import ray, which reads the environment variables that
`join_cluster` sets, and a run that is complete needs no cluster.
"""

import math
import pkgutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.config.base import UserError
from rayfuse.config.recipe import Recipe
from rayfuse.corpus.summary import summarize
from rayfuse.evaluate.results import is_evaluated
from rayfuse.imports.capture import check_imports
from rayfuse.remaining import list_remaining
from rayfuse.report.results import print_scores
from rayfuse.report.stage import is_report_current, write_report
from rayfuse.run.budget import NO_LIMITS, STOP_STAGES, Budget, Limits, open_budget
from rayfuse.run.failed_sources import describe_failed, drop_sources, plan_run
from rayfuse.run.layout import Layout
from rayfuse.run.made_models import is_made, read_inputs
from rayfuse.run.prepare import check_weights, list_tokenizer_notes
from rayfuse.runtime.connect import join_cluster
from rayfuse.runtime.console import ProgressBars
from rayfuse.runtime.progress import Progress, ShouldStop, StoppedEarly, never_stop
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.store import check_store

STAGES = ("corpus", "capture", "align", "train", "evaluate", "report")

MODEL_STAGES = ("capture", "train", "evaluate")
"""The stages that load models, on nodes with GPUs if there are any."""

STAGE_FUNCTIONS = {
    "corpus": "rayfuse.corpus.stage:build_corpora",
    "capture": "rayfuse.align.after_capture:capture_and_align",
    "align": "rayfuse.align.stage:align_sources",
    "train": "rayfuse.train.stage:train_runs",
    "evaluate": "rayfuse.evaluate.stage:evaluate_models",
}
"""The function of each stage that runs on Ray, as module:function. It is imported when it is used:
importing ray reads the environment that `join_cluster` sets, and one stage does not wait for the
libraries of the others."""


INPUT_STAGES = {"capture": "corpus", "align": "capture", "train": "align", "evaluate": "train"}
"""The stage whose results each stage reads."""


@dataclass(frozen=True)
class StageResult:
    """The outcome of one stage."""

    stage: str
    was_done: bool
    """Complete before, so it was skipped."""
    seconds: float


def prepare_run(recipe: Recipe) -> Layout:
    """Lay out a run, after checking everything that can be checked without a cluster.

    Raises:
        UserError: A model, the documents, the storage or a task cannot be used.
    """
    layout = plan_run(recipe, ALIGN_FACTS)
    recipe = drop_sources(recipe, layout.failed)
    check_store(layout.store)
    check_imports(recipe, layout)
    if not all(is_stage_done(stage, layout) for stage in MODEL_STAGES):
        check_weights(recipe)
    if recipe.evaluate.tasks is not None and not is_stage_done("evaluate", layout):
        from rayfuse.evaluate.lm_eval_tasks import check_tasks  # lm-eval is optional

        check_tasks(recipe.evaluate)
    return layout


def run_stages(
    recipe: Recipe,
    layout: Layout,
    stages: tuple[str, ...],
    progress: Progress,
    report_result: Callable[[StageResult], None],
    *,
    should_stop: ShouldStop = never_stop,
) -> Layout:
    """Run stages in order, skipping those that are complete, and report the result of each.

    Args:
        recipe: The complete recipe.
        layout: Its run, without the sources that have failed.
        stages: Some of `STAGES`.
        progress: Receives the events of all stages.
        report_result: Called after each stage.
        should_stop: Once it returns True, no further stage starts; all but the corpus stage stop
            where nothing is lost.

    Returns:
        The layout, without the sources whose capture has failed meanwhile.

    Raises:
        StoppedEarly: It has stopped, as it was to.
        UserError: The input of a stage is missing or cannot be used.
        ShardError: A shard that is read is missing or corrupt.
    """
    given, recipe = recipe, drop_sources(recipe, layout.failed)
    for stage in stages:
        began = time.monotonic()
        was_done = is_stage_done(stage, layout)
        if not was_done:
            _check_input(stage, layout)
            if should_stop():
                raise StoppedEarly
            with _prewarm_if_next(stage, stages, recipe, layout, progress) as report:
                _run_stage(stage, recipe, layout, report, should_stop)
            if stage == "capture" and any(not source.required for source in recipe.sources):
                layout = plan_run(given, ALIGN_FACTS)
                recipe = drop_sources(given, layout.failed)
        report_result(StageResult(stage, was_done, time.monotonic() - began))
    return layout


def _check_input(stage: str, layout: Layout) -> None:
    """Check that the stage whose results a stage reads is complete, before a cluster is joined.

    Raises:
        UserError: It is not.
    """
    needed = INPUT_STAGES.get(stage)
    if needed is not None and not is_stage_done(needed, layout):
        folders = [data.folder for data in _list_outputs(needed, layout) if not data.is_complete()]
        where = f" ({', '.join(folders)})" if folders else ""
        raise UserError(f"stage {needed} is incomplete{where}; run `rayfuse {needed}` first")


def run_recipe(
    recipe: Recipe,
    stages: tuple[str, ...],
    console: Console,
    *,
    file: str | None = None,
    limits: Limits = NO_LIMITS,
) -> dict[str, Any]:
    """Run stages of a recipe, print their results, and return them as plain values.

    Args:
        recipe: The recipe.
        stages: Some of `STAGES`.
        console: Where progress and results are printed.
        file: The recipe's file, for hints.
        limits: What this call may cost. `stopped` of the result describes that one was reached.

    Raises:
        UserError: A model, the documents or the storage cannot be used, a limit is not above 0, or
            a worker has no price.
        ShardError: A shard that is read is missing or corrupt.
    """
    began = time.monotonic()
    layout = prepare_run(recipe)
    given, recipe = recipe, drop_sources(recipe, layout.failed)
    is_priced = limits.max_dollars is not None
    budget = open_budget(recipe, layout, _list_open(stages, layout) if is_priced else (), limits)
    title = "recipe" if file is None else f"recipe {file}"
    console.print(f"{title}: {', '.join(stages)} in {layout.store.root}")
    _print_reuse(layout, console)
    _print_failed(layout, console)
    for note in list_tokenizer_notes(recipe):
        console.print(f"warning: {note}", highlight=False)

    def report_result(result: StageResult) -> None:
        state = "complete before" if result.was_done else f"complete in {result.seconds:.1f} s"
        console.print(f"{result.stage:<9} {state}", highlight=False)

    if all(is_stage_done(stage, layout) for stage in stages):
        console.print("nothing to do: everything is complete", highlight=False)
    else:
        try:
            with ProgressBars(console) as bars:
                watched = budget.watch(bars) if budget.is_limited else bars
                stop = budget.is_reached if budget.is_limited else never_stop
                before = layout.failed
                layout = run_stages(given, layout, stages, watched, report_result, should_stop=stop)
            if layout.failed != before:
                _print_failed(layout, console)
        except StoppedEarly:
            layout = plan_run(given, ALIGN_FACTS)
            recipe = drop_sources(given, layout.failed)
            return {"stopped": _report_stop(recipe, layout, stages, budget, console)}
    values = print_results(layout, stages, console)
    remaining = [stage for stage in STAGES if not is_stage_done(stage, layout)]
    if remaining and file is not None:
        console.print(f"next: rayfuse {remaining[0]} {file}", highlight=False)
    return values | {"seconds": round(time.monotonic() - began, 1)}


def _list_open(stages: tuple[str, ...], layout: Layout) -> tuple[str, ...]:
    return tuple(stage for stage in stages if not is_stage_done(stage, layout))


def _report_stop(
    recipe: Recipe, layout: Layout, stages: tuple[str, ...], budget: Budget, console: Console
) -> dict[str, Any]:
    """Print what a command has cost until its limit and what is left, and return both."""
    remaining = list_remaining(recipe, layout)
    open_stages = _list_open(stages, layout)
    left = ", ".join(part.describe() for part in remaining) or f"stages {', '.join(open_stages)}"
    dollars = None if budget.max_dollars is None else round(budget.dollars, 4)
    cost = f"{budget.hours:.2f} hours" + ("" if dollars is None else f", ${dollars:,.2f}")
    console.print(
        f"stopped at {budget.describe_reached()}: {cost} in this command; everything that is "
        f"committed is kept; left: {left}; to resume, run the same command",
        highlight=False,
    )
    return {
        "limit": budget.describe_reached(),
        "hours": round(budget.hours, 4),
        "dollars": dollars,
        "stages": list(open_stages),
        "left": {part.part: {part.unit: part.left, "of": part.total} for part in remaining},
    }


def _print_reuse(layout: Layout, console: Console) -> None:
    if layout.corpus_documents.segmentation.is_reused:
        models = ", ".join(model.model for model in layout.corpus_documents.segmentation.split_for)
        console.print(
            f"rows: reused, as split for {models} (corpus.resplit: true splits them again)"
        )


def _print_failed(layout: Layout, console: Console) -> None:
    """Print which sources a run does without, and how they are captured again."""
    for name, sentence in zip(layout.failed, describe_failed(layout.failed), strict=True):
        console.print(
            f"warning: {sentence} To capture it again, set sources.{name}.required=true or change "
            "another of its settings.",
            highlight=False,
        )


def print_results(layout: Layout, stages: tuple[str, ...], console: Console) -> dict[str, Any]:
    """Print what a run holds after these stages, and return it as plain values.

    Raises:
        ShardError: A record is corrupt.
    """
    values: dict[str, Any] = {"stages": {stage: is_stage_done(stage, layout) for stage in stages}}
    values["failed_sources"] = dict(layout.failed)
    for name, data in {"corpus": layout.corpus, **layout.captured}.items():
        commits = data.commits().values()
        if commits:
            tokens = sum(commit.tokens for commit in commits)
            rejects = sum(commit.rejects for commit in commits)
            values[name] = {"shards": len(commits), "tokens": tokens, "rejects": rejects}
            text = f"  {name:<18} {len(commits)} shards, {tokens:,} tokens, {rejects} rejected"
            console.print(text, highlight=False)
    values |= _print_documents(layout, console)
    if is_stage_done("evaluate", layout) and stages[-1] in ("evaluate", "report"):
        values |= print_scores(layout, console)
    return values


def _print_documents(layout: Layout, console: Console) -> dict[str, Any]:
    """Print what became of the documents, and return it as plain values."""
    corpus, held_out = layout.corpus_documents, layout.held_out_documents
    parts = {"documents": ([layout.corpus, layout.held_out], corpus)}
    if corpus.files != held_out.files:
        parts = {
            "documents": ([layout.corpus], corpus),
            "held-out documents": ([layout.held_out], held_out),
        }
    values: dict[str, Any] = {}
    for name, (data_sets, documents) in parts.items():
        summary = summarize(data_sets, len(documents.files))
        if not summary.documents:
            continue
        values[name] = summary.to_json() | {"skipped": dict(documents.skipped)}
        skipped = ", ".join(f"{count:,} {cause}" for cause, count in documents.skipped.items())
        files = f"{summary.files:,} files" + (f" (skipped: {skipped})" if skipped else "")
        console.print(
            f"  {name:<18} {files}, {summary.documents:,} documents, "
            f"rejected: {summary.describe_rejects()}",
            highlight=False,
        )
    return values


def _list_outputs(stage: str, layout: Layout) -> list[DataSet]:
    """List the data sets that a stage writes; none for the stages after align."""
    outputs = {
        "corpus": [layout.corpus, layout.held_out],
        "capture": [*layout.captured.values()],
        "align": [*layout.aligned.values()],
    }
    return outputs.get(stage, [])


def is_stage_done(stage: str, layout: Layout) -> bool:
    """Check whether all results of a stage exist."""
    store = layout.store
    if data_sets := _list_outputs(stage, layout):
        return all(data.is_complete() for data in data_sets)
    if stage == "train":
        return all(is_made(store, run.folder, read_inputs(layout, run)) for run in layout.runs)
    if stage == "evaluate":
        return is_evaluated(layout)
    return is_report_current(layout)


@contextmanager
def _prewarm_if_next(
    stage: str, stages: tuple[str, ...], recipe: Recipe, layout: Layout, progress: Progress
) -> Iterator[Progress]:
    """Yield the progress callback of a stage; before capture it also starts the sources' nodes."""
    if stage != "corpus" or "capture" not in stages:
        yield progress
        return
    join_cluster()
    from rayfuse.runtime import prewarm, resources  # they import ray, which must join first

    todo = [
        source for source in recipe.run_sources if not layout.captured[source.name].is_complete()
    ]
    seconds = _estimate_corpus_seconds(recipe, layout, resources.count_reachable("CPU"))
    with prewarm.prewarm_sources(todo, seconds, progress) as report:
        yield report


def _estimate_corpus_seconds(recipe: Recipe, layout: Layout, cpus: float) -> float:
    """Estimate the corpus stage's duration by the plan's assumptions; infinity if unknown."""
    sizes = [
        file.num_bytes * (recipe.plan.unpacked_ratio if file.is_packed else 1.0)
        for file in layout.corpus_documents.files
    ]
    if not all(sizes):
        return math.inf
    parallel_tasks = max(min(cpus, len(sizes)), 1.0)  # one task reads a file
    tokenizers = 1 + len(recipe.sources)
    return sum(sizes) * tokenizers / recipe.plan.tokenize_bytes_per_core_second / parallel_tasks


def _run_stage(
    stage: str, recipe: Recipe, layout: Layout, progress: Progress, should_stop: ShouldStop
) -> None:
    if stage == "report":
        write_report(recipe, layout)
        return
    join_cluster()
    run = pkgutil.resolve_name(STAGE_FUNCTIONS[stage])
    stop = {"should_stop": should_stop} if stage in STOP_STAGES else {}
    run(recipe, layout, progress, **stop)
