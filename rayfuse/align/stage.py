"""The align stage: captured shards -> aligned shards, on CPUs, and the vocabulary maps for it."""

from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import TaskPoolStrategy

from rayfuse.align.method import IdMap, MapInputs, StoredMap, load_method
from rayfuse.align.task import (
    MAP,
    AlignTask,
    align_committed,
    encode_map,
    plan_task,
    record_of_map,
    write_map_record,
)
from rayfuse.config.base import UserError
from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.run.layout import Layout
from rayfuse.runtime.progress import Progress, ProgressEvent, ShouldStop, never_stop
from rayfuse.runtime.resources import TASK_RETRIES, limit_cpu_tasks
from rayfuse.runtime.wait import TaskWait
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.files import hash_bytes
from rayfuse.storage.todo import list_missing, split_shards


def align_sources(
    recipe: Recipe, layout: Layout, progress: Progress, should_stop: ShouldStop = never_stop
) -> None:
    """Align every captured shard that is not aligned yet.

    Args:
        recipe: The recipe.
        layout: Its run.
        progress: Receives an event after each shard.
        should_stop: Once it returns True, the stage stops after the next shard or stored map.

    Raises:
        StoppedEarly: It has stopped, as it was to.
        UserError: A source is not captured completely.
    """
    wait = TaskWait(should_stop)
    build_vocab_maps(recipe, layout, progress, should_stop)
    for source in recipe.sources:
        aligned, captured = layout.aligned[source.name], layout.captured[source.name]
        if aligned.is_complete():
            continue
        if not captured.is_complete():
            raise UserError(
                f"source {source.name} is not captured completely; run `rayfuse capture` first"
            )
        aligned.claim({"recipe": dump_recipe(recipe), "source": source.name})
        manifest = captured.read_manifest()
        assert manifest is not None, "the source is captured completely"
        num_shards = manifest.num_shards
        missing = list_missing(aligned, num_shards, partial(_report, progress, source.name))
        task = plan_task(recipe, layout, source)
        if missing:
            rows = ray.data.from_arrow(split_shards(missing)).map_batches(
                partial(align_batch, task=task),
                batch_size=1,
                batch_format="pyarrow",
                compute=TaskPoolStrategy(limit_cpu_tasks()),
            )
            for done, _ in enumerate(rows.iter_rows(), num_shards - len(missing) + 1):
                progress(ProgressEvent("align", source.name, done, num_shards, "shards"))
                if done < num_shards:
                    wait.check_stored()
        aligned.finish(num_shards)


def _report(progress: Progress, part: str, note: str) -> None:
    progress(ProgressEvent("align", part, note=note))


def align_batch(batch: pa.Table, task: AlignTask) -> pa.Table:
    """Align the shards with the numbers in a batch, and return the numbers."""
    commits = [align_committed(task, shard) for shard in batch["shard"].to_pylist()]
    tokens = [commit.tokens for commit in commits]
    return pa.table({"shard": [commit.shard for commit in commits], "tokens": tokens})


def build_vocab_maps(
    recipe: Recipe, layout: Layout, progress: Progress, should_stop: ShouldStop = never_stop
) -> None:
    """Compute and store the vocabulary maps that the recipe's method needs and that are missing.

    Raises:
        StoppedEarly: It has stopped after a stored map, as it was to.
    """
    wait = TaskWait(should_stop)
    present = layout.store.sizes("maps")
    stored_map = load_method(recipe.align.method).stored_map
    for source in recipe.sources:
        map_file = layout.map_files.get(source.name)
        if map_file is None or record_of_map(map_file).removeprefix("maps/") in present:
            continue
        assert stored_map is not None, "the layout names files only for methods that store a map"
        inputs = MapInputs(source, recipe.target, layout.corpus, recipe.corpus.is_chat)
        id_map = _compute_map(inputs, stored_map, f"map of {source.name}", progress, wait)
        layout.store.create(map_file, encode_map(id_map))  # another job may have been first
        content = layout.store.read(map_file)
        _drop_aligned_by_another(layout.aligned[source.name], content, progress)
        write_map_record(layout.store, map_file, content)
        wait.check_stored()


def _drop_aligned_by_another(aligned: DataSet, content: bytes, progress: Progress) -> None:
    """Drop the shards that were aligned by another map than the one that is written now."""
    sha256 = hash_bytes(content)["sha256"]
    stale = [s for s, c in aligned.commits().items() if c.inputs.get(MAP, sha256) != sha256]
    if stale:
        _report(progress, aligned.name, "the vocabulary map has changed: shards are aligned again")
        aligned.drop_shards(stale)


def _compute_map(
    inputs: MapInputs, stored_map: StoredMap, part: str, progress: Progress, wait: TaskWait
) -> IdMap:
    compute: Any = ray.remote(max_retries=TASK_RETRIES)(stored_map.compute_part)
    arguments = stored_map.list_parts(inputs)
    waiting = [compute.remote(inputs, argument) for argument in arguments]
    merged = stored_map.merge([])
    # Results are merged as they arrive, so the driver never holds more than a few of them.
    try:
        while waiting:
            ready, waiting = wait.take_ready(waiting)
            merged = stored_map.merge([merged, ray.get(ready)])
            done = len(arguments) - len(waiting)
            progress(ProgressEvent("align", part, done, len(arguments), stored_map.unit))
    finally:
        for reference in waiting:
            ray.cancel(reference)
    return stored_map.finish(inputs, merged)
