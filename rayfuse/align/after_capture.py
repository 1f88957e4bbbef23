"""The capture stage of a run: sources are imported, or captured and aligned right after."""

from rayfuse.align.stage import build_vocab_maps
from rayfuse.align.task import plan_align_step
from rayfuse.capture.stage import capture_sources
from rayfuse.config.recipe import Recipe
from rayfuse.imports.capture import import_sources
from rayfuse.run.layout import Layout
from rayfuse.runtime.progress import Progress, ShouldStop, never_stop


def capture_and_align(
    recipe: Recipe, layout: Layout, progress: Progress, should_stop: ShouldStop = never_stop
) -> None:
    """Import the sources that have a store; capture the others, and align each shard then."""
    import_sources(recipe, layout, progress, should_stop)
    build_vocab_maps(recipe, layout, progress, should_stop)
    capture_sources(recipe, layout, progress, then=plan_align_step, should_stop=should_stop)
