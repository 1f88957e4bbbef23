"""The align stage: captured shards -> aligned shards, on CPUs."""

from functools import partial

import pyarrow as pa
import ray

from rayfuse.align.task import AlignTask, align_committed
from rayfuse.layout import Layout
from rayfuse.progress import Progress
from rayfuse.recipe import Recipe, dump_recipe


def align_sources(recipe: Recipe, layout: Layout, progress: Progress) -> None:
    """Align every captured shard that is not aligned yet.

    Raises:
        ValueError: A source is not captured.
    """
    for source in recipe.sources:
        aligned, captured = layout.aligned[source.name], layout.captured[source.name]
        if aligned.is_whole():
            continue
        if not captured.is_whole():
            raise ValueError(
                f"source {source.name} is not captured whole; run `rayfuse capture` first"
            )
        aligned.claim({"recipe": dump_recipe(recipe), "source": source.name})
        aligned.drop_lost_shards()
        shards = sorted(captured.commits())
        todo = sorted(set(shards) - set(aligned.commits()))
        task = AlignTask(source, recipe.target, layout.corpus, captured, aligned)
        if todo:
            items = [{"shard": shard} for shard in todo]
            rows = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
                partial(align_batch, task=task), batch_size=1, batch_format="pyarrow"
            )
            for done, _ in enumerate(rows.iter_rows(), len(shards) - len(todo) + 1):
                progress(f"align {source.name}", done, len(shards), "shards")
        aligned.finish(len(shards))


def align_batch(batch: pa.Table, task: AlignTask) -> pa.Table:
    """Align the shards that a batch names, and return their numbers."""
    commits = [align_committed(task, shard) for shard in batch["shard"].to_pylist()]
    tokens = [commit.tokens for commit in commits]
    return pa.table({"shard": [commit.shard for commit in commits], "tokens": tokens})
