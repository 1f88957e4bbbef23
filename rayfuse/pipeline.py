"""The stages of a run in order, and which of them are done. Ray is joined only for what is not."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rayfuse.config.recipe import Recipe
from rayfuse.run.layout import Layout, plan_layout
from rayfuse.runtime.progress import Progress
from rayfuse.storage.store import check_store

STAGES = ("corpus", "capture", "align", "train", "evaluate", "report")


@dataclass(frozen=True)
class StageResult:
    """What became of one stage."""

    stage: str
    was_done: bool
    seconds: float


def prepare_run(recipe: Recipe) -> Layout:
    """Return where a run lies, after checking what can be checked without a cluster.

    Raises:
        ValueError: A model, the documents, the storage or a task cannot be used.
    """
    layout = plan_layout(recipe)
    check_store(layout.store)
    if recipe.evaluate.tasks is not None and not is_stage_done("evaluate", layout):
        from rayfuse.evaluate.lm_eval_tasks import check_tasks

        check_tasks(recipe.evaluate)
    return layout


def run_stages(
    recipe: Recipe,
    layout: Layout,
    stages: tuple[str, ...],
    progress: Progress,
    tell: Callable[[StageResult], None],
) -> None:
    """Run stages in order, skipping those that are done; each one's end is told.

    Raises:
        ValueError: The input of a stage is missing or cannot be used.
        ShardError: A shard that is read is missing or corrupt.
    """
    for stage in stages:
        began = time.monotonic()
        was_done = is_stage_done(stage, layout)
        if not was_done:
            with _prewarm_if_next(stage, stages, recipe, layout, progress) as report:
                _run_stage(stage, recipe, layout, report)
        tell(StageResult(stage, was_done, time.monotonic() - began))


def is_stage_done(stage: str, layout: Layout) -> bool:
    """Return whether a stage's results are all there."""
    store = layout.store
    if stage == "corpus":
        return layout.corpus.is_complete() and layout.held_out.is_complete()
    if stage == "capture":
        return all(data.is_complete() for data in layout.captured.values())
    if stage == "align":
        return all(data.is_complete() for data in layout.aligned.values())
    if stage == "train":
        return all("done.json" in store.sizes(run.folder) for run in layout.runs)
    if stage == "evaluate":
        present = store.sizes("evaluate")
        names = [name.removeprefix("evaluate/") for name in layout.list_results()]
        return all(name in present for name in names)
    from rayfuse.report.stage import is_report_current

    return is_report_current(layout)


@contextmanager
def _prewarm_if_next(
    stage: str, stages: tuple[str, ...], recipe: Recipe, layout: Layout, progress: Progress
) -> Iterator[Progress]:
    """Yield the progress callback of a stage; before capture it also starts the sources' nodes."""
    if stage != "corpus" or "capture" not in stages:
        yield progress
        return
    from rayfuse.runtime.connect import join_cluster

    join_cluster()
    from rayfuse.runtime.prewarm import prewarm_sources  # imports ray, which must join first
    from rayfuse.runtime.resources import count_reachable

    todo = [each for each in recipe.sources if not layout.captured[each.name].is_complete()]
    seconds = _estimate_corpus_seconds(recipe, layout, count_reachable("CPU"))
    with prewarm_sources(todo, seconds, progress) as report:
        yield report


def _estimate_corpus_seconds(recipe: Recipe, layout: Layout, cpus: float) -> float:
    """Estimate the corpus stage's duration by the plan's assumptions; infinity if unknown."""
    sizes = [
        file.num_bytes * (recipe.plan.unpacked_ratio if file.is_packed else 1.0)
        for file in layout.corpus_inputs
    ]
    if not all(sizes):
        return math.inf
    parallel_tasks = max(min(cpus, len(sizes)), 1.0)  # one task reads a file
    tokenizers = 1 + len(recipe.sources)
    return sum(sizes) * tokenizers / recipe.plan.tokenise_bytes_per_core_second / parallel_tasks


def _run_stage(stage: str, recipe: Recipe, layout: Layout, progress: Progress) -> None:
    if stage == "report":
        from rayfuse.report.stage import write_report

        write_report(recipe, layout)
        return
    from rayfuse.runtime.connect import join_cluster

    join_cluster()
    if stage == "corpus":
        from rayfuse.corpus.stage import build_corpora

        build_corpora(recipe, layout, progress)
    elif stage == "capture":
        from rayfuse.align.stage import build_vocab_maps
        from rayfuse.capture.stage import capture_sources

        build_vocab_maps(recipe, layout, progress)  # alignment runs right behind capture
        capture_sources(recipe, layout, progress)
    elif stage == "align":
        from rayfuse.align.stage import align_sources

        align_sources(recipe, layout, progress)
    elif stage == "train":
        from rayfuse.train.stage import train_runs

        train_runs(recipe, layout, progress)
    else:
        from rayfuse.evaluate.stage import evaluate_models

        evaluate_models(recipe, layout, progress)
