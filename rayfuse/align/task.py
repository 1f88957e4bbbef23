"""Aligning one committed shard: read, align, commit. Run by the capture and the align stage."""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from rayfuse.align.shard import Alignment, Method, align_shard
from rayfuse.align.token_spans import list_token_bytes
from rayfuse.align.vocab_map import VocabMaps, build_maps, map_vocabulary
from rayfuse.config.models import ModelSettings, SourceSettings
from rayfuse.config.recipe import Recipe
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.models.tokenizer import TextTokenizer
from rayfuse.run.layout import Layout
from rayfuse.runtime.metrics import count_work
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.manifest import Commit
from rayfuse.storage.store import Store


@dataclass(frozen=True)
class AlignTask:
    """Where one source's shards come from and go to."""

    source: ModelSettings
    target: ModelSettings
    corpus: DataSet
    captured: DataSet
    aligned: DataSet
    method: Method
    map_file: str | None
    """The stored vocabulary map, for the methods that take long to make one."""

    @property
    def name(self) -> str:
        """What the source is called."""
        return self.aligned.name


def plan_task(recipe: Recipe, layout: Layout, source: SourceSettings) -> AlignTask:
    """Return what aligning one source of a recipe needs."""
    return AlignTask(
        source=source,
        target=recipe.target,
        corpus=layout.corpus,
        captured=layout.captured[source.name],
        aligned=layout.aligned[source.name],
        method=recipe.align.method,
        map_file=layout.map_files.get(source.name),
    )


def plan_align_step(
    recipe: Recipe, layout: Layout, source: SourceSettings
) -> Callable[[int], None]:
    """Plan the step that aligns a shard of one source right after it is captured.

    The step takes the shard's number and can be pickled. It keeps a shard that is aligned already:
    the captured rows are the same.
    """
    return partial(_align_if_missing, plan_task(recipe, layout, source))


def _align_if_missing(task: AlignTask, shard: int) -> None:
    if not task.aligned.is_committed(shard):
        align_committed(task, shard)


def align_committed(task: AlignTask, shard: int) -> Commit:
    """Align a captured shard, store the result and return its commit.

    Raises:
        ShardError: A shard that is read is missing or corrupt.
        ValueError: As for `align_captured`.
    """
    began = time.monotonic()
    table, stats = align_captured(task, shard)
    tokens = int(stats["positions"])
    commit = task.aligned.write_shard(shard, table, tokens=tokens, stats=stats)
    seconds = time.monotonic() - began
    count_work("align", task.name, rows=commit.rows, tokens=tokens, seconds=seconds)
    return commit


def align_captured(task: AlignTask, shard: int) -> tuple[pa.Table, dict[str, float]]:
    """Return a captured shard's ALIGNED rows and their sums.

    Raises:
        ShardError: A shard that is read is missing or corrupt.
        ValueError: The captured shard does not belong to the corpus shard; the message names the
            shard, the row and, where it can, the position.
    """
    corpus = task.corpus.read_shard(task.corpus.read_commit(shard))
    commit = task.captured.read_commit(shard)
    captured = task.captured.read_shard(commit)
    # Frozen pydantic models do hash; the type checker does not know.
    alignment = load_alignment(task)  # pyright: ignore[reportArgumentType]
    try:
        return align_shard(corpus, captured, alignment)
    except ValueError as error:
        name = f"{task.captured.folder}/{commit.file}"
        raise ValueError(f"{name}: {error}; remove it and capture the shard again") from error


@lru_cache(maxsize=8)
def load_alignment(task: AlignTask) -> Alignment:
    """Return what a task's shards are aligned with.

    Raises:
        FileNotFoundError: The method's vocabulary map is not stored yet.
    """
    source, target = load_recipe_tokenizer(task.source), load_recipe_tokenizer(task.target)
    if task.map_file is None:
        maps = map_vocabulary(source, target, only_equal=task.method == "exact")
    else:
        maps = read_maps(task.aligned.store, task.map_file, source, target)
    return Alignment(list_token_bytes(source), list_token_bytes(target), maps, task.method)


def read_maps(
    store: Store, map_file: str, source: TextTokenizer, target: TextTokenizer
) -> VocabMaps:
    """Return the vocabulary maps of a stored one."""
    table = pq.read_table(io.BytesIO(store.read(map_file)))
    return build_maps(table["target_id"].to_numpy(), source, target)


def write_map(store: Store, map_file: str, plain: Int[np.ndarray, " source_vocab"]) -> None:
    """Store a vocabulary map, the target id of each source id; the first one stored stays."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"target_id": plain}), sink, compression="zstd")
    store.create(map_file, sink.getvalue().to_pybytes())
