"""The align stage: captured shards -> aligned shards, on CPUs, and the vocabulary maps for it."""

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import TaskPoolStrategy

from rayfuse.align.cooccurrence import PairCounts, add_counts, choose_most_matched, count_pairs
from rayfuse.align.task import AlignTask, align_committed, plan_task, write_map
from rayfuse.align.token_spans import list_token_bytes
from rayfuse.align.vocab_map import PLAIN, map_to_nearest, map_vocabulary
from rayfuse.config.models import ModelSettings
from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.run.layout import Layout
from rayfuse.runtime.progress import Progress, ProgressEvent
from rayfuse.runtime.resources import TASK_RETRIES, limit_cpu_tasks
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.todo import list_missing, split_shards

MINED_CHUNK = 2048
"""Source tokens whose nearest target tokens one task finds: about a second of one core."""


def align_sources(recipe: Recipe, layout: Layout, progress: Progress) -> None:
    """Align every captured shard that is not aligned yet.

    Raises:
        ValueError: A source is not captured.
    """
    build_vocab_maps(recipe, layout, progress)
    for source in recipe.sources:
        aligned, captured = layout.aligned[source.name], layout.captured[source.name]
        if aligned.is_complete():
            continue
        if not captured.is_complete():
            raise ValueError(
                f"source {source.name} is not captured whole; run `rayfuse capture` first"
            )
        aligned.claim({"recipe": dump_recipe(recipe), "source": source.name})
        manifest = captured.read_manifest()
        assert manifest is not None, "the source is captured whole"
        num_shards = manifest.num_shards
        todo = list_missing(aligned, num_shards)
        task = plan_task(recipe, layout, source)
        if todo:
            rows = ray.data.from_arrow(split_shards(todo)).map_batches(
                partial(align_batch, task=task),
                batch_size=1,
                batch_format="pyarrow",
                compute=TaskPoolStrategy(limit_cpu_tasks()),
            )
            for done, _ in enumerate(rows.iter_rows(), num_shards - len(todo) + 1):
                progress(ProgressEvent("align", source.name, done, num_shards, "shards"))
        aligned.finish(num_shards)


def align_batch(batch: pa.Table, task: AlignTask) -> pa.Table:
    """Align the shards that a batch names, and return their numbers."""
    commits = [align_committed(task, shard) for shard in batch["shard"].to_pylist()]
    tokens = [commit.tokens for commit in commits]
    return pa.table({"shard": [commit.shard for commit in commits], "tokens": tokens})


def build_vocab_maps(recipe: Recipe, layout: Layout, progress: Progress) -> None:
    """Make and store the vocabulary maps that the recipe's method needs and that are not there."""
    present = layout.store.sizes("maps")
    for source in recipe.sources:
        map_file = layout.map_files.get(source.name)
        if map_file is None or map_file.removeprefix("maps/") in present:
            continue
        part = f"map of {source.name}"
        if recipe.align.method == "min_edit_distance":
            plain = _mine_map(source, recipe.target, part, progress)
        else:
            plain = _count_map(source, recipe.target, layout.corpus, part, progress)
        write_map(layout.store, map_file, plain)


def _mine_map(
    source: ModelSettings, target: ModelSettings, part: str, progress: Progress
) -> np.ndarray:
    vocab_size = load_recipe_tokenizer(source).vocab_size
    find: Any = ray.remote(max_retries=TASK_RETRIES)(_find_nearest)
    starts = range(0, vocab_size, MINED_CHUNK)
    chunks = [
        find.remote(source, target, start, min(start + MINED_CHUNK, vocab_size)) for start in starts
    ]
    mapped: list[np.ndarray] = []
    for done, chunk in enumerate(chunks, 1):
        mapped.append(ray.get(chunk))
        progress(ProgressEvent("align", part, done, len(chunks), "chunks"))
    return np.concatenate(mapped)


def _find_nearest(
    source: ModelSettings, target: ModelSettings, start: int, stop: int
) -> np.ndarray:
    ids = list(range(start, stop))
    return map_to_nearest(ids, load_recipe_tokenizer(source), load_recipe_tokenizer(target))


def _count_map(
    source: ModelSettings, target: ModelSettings, corpus: DataSet, part: str, progress: Progress
) -> np.ndarray:
    count: Any = ray.remote(max_retries=TASK_RETRIES)(_count_shard)
    waiting = [
        count.remote(source, target, corpus, shard) for shard in sorted(corpus.list_committed())
    ]
    num_shards, total = len(waiting), add_counts([])
    while waiting:
        ready, waiting = ray.wait(waiting)
        total = add_counts([total, *ray.get(ready)])
        done = num_shards - len(waiting)
        progress(ProgressEvent("align", part, done, num_shards, "shards"))
    unseen = map_vocabulary(load_recipe_tokenizer(source), load_recipe_tokenizer(target))
    return choose_most_matched(total, unseen[PLAIN, :-1])


def _count_shard(
    source: ModelSettings, target: ModelSettings, corpus: DataSet, shard: int
) -> PairCounts:
    rows = corpus.read_shard(
        corpus.read_commit(shard), columns=["text", "ends_document", "target_ids"]
    )
    ours, theirs = (list_token_bytes(load_recipe_tokenizer(model)) for model in (source, target))
    return count_pairs(rows, ours, theirs)
