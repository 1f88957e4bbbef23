"""The function that runs each stage, by the stage's name.

Importing this module imports ray, which reads the environment variables that `join_cluster` sets:
join the cluster first.
"""

from collections.abc import Callable

from rayfuse.align.stage import align_sources, build_vocab_maps
from rayfuse.align.task import plan_align_step
from rayfuse.capture.stage import capture_sources
from rayfuse.config.recipe import Recipe
from rayfuse.corpus.stage import build_corpora
from rayfuse.evaluate.stage import evaluate_models
from rayfuse.run.layout import Layout
from rayfuse.runtime.progress import Progress
from rayfuse.train.stage import train_runs


def capture_and_align(recipe: Recipe, layout: Layout, progress: Progress) -> None:
    """Capture every source, and align each shard as soon as it is captured."""
    build_vocab_maps(recipe, layout, progress)
    capture_sources(recipe, layout, progress, then=plan_align_step)


RUN_STAGE: dict[str, Callable[[Recipe, Layout, Progress], None]] = {
    "corpus": build_corpora,
    "capture": capture_and_align,
    "align": align_sources,
    "train": train_runs,
    "evaluate": evaluate_models,
}
