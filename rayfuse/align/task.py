"""Aligning one committed shard: read, align, commit. Run by the capture and the align stage."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import pyarrow as pa
import pyarrow.parquet as pq

from rayfuse.align.method import Alignment, IdMap, build_alignment
from rayfuse.align.shard import align_shard
from rayfuse.align.vocab_map import VocabMaps, build_maps
from rayfuse.config.models import ModelSettings, SourceSettings
from rayfuse.config.recipe import Recipe
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.models.tokenizer import TextTokenizer
from rayfuse.run.layout import Layout
from rayfuse.runtime.metrics import count_work
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.manifest import Commit, ShardError
from rayfuse.storage.parquet import read_parquet
from rayfuse.storage.store import Store


@dataclass(frozen=True)
class AlignTask:
    """Where one source's shards come from and go to."""

    source: ModelSettings
    target: ModelSettings
    corpus: DataSet
    captured: DataSet
    aligned: DataSet
    method: str
    """A registered name."""
    map_file: str | None
    """The stored vocabulary map, for methods that store one."""

    @property
    def name(self) -> str:
        """The source's name."""
        return self.aligned.name


def plan_task(recipe: Recipe, layout: Layout, source: SourceSettings) -> AlignTask:
    """Collect the settings and data sets for aligning one source of a recipe."""
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
        ShardError: As for `align_captured`.
    """
    began = time.monotonic()
    table, stats = align_captured(task, shard)
    tokens = int(stats["positions"])
    commit = task.aligned.write_shard(shard, table, tokens=tokens, stats=stats)
    seconds = time.monotonic() - began
    count_work("align", task.name, rows=commit.rows, tokens=tokens, seconds=seconds)
    return commit


def align_captured(task: AlignTask, shard: int) -> tuple[pa.Table, dict[str, float]]:
    """Align a captured shard, without storing it; return its ALIGNED rows and their sums.

    Raises:
        ShardError: A shard that is read is missing or corrupt, or the captured shard does not
            belong to the corpus shard; then the message names the shard, the row and, where it
            can, the position.
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
        raise ShardError(f"{name}: {error}; remove it and capture the shard again") from error


@lru_cache(maxsize=8)
def load_alignment(task: AlignTask) -> Alignment:
    """Load both vocabularies and the vocabulary map of a task; once per process and task.

    Raises:
        FileNotFoundError: The method's vocabulary map is not stored yet.
    """
    source, target = load_recipe_tokenizer(task.source), load_recipe_tokenizer(task.target)
    maps = None
    if task.map_file is not None:
        maps = read_maps(task.aligned.store, task.map_file, source, target)
    return build_alignment(source, target, task.method, maps)


def read_maps(
    store: Store, map_file: str, source: TextTokenizer, target: TextTokenizer
) -> VocabMaps:
    """Read a stored vocabulary map, and build the three maps from it."""
    table = read_parquet(store.read(map_file))
    return build_maps(table["target_id"].to_numpy(), source, target)


def write_map(store: Store, map_file: str, id_map: IdMap) -> None:
    """Store a vocabulary map, the target id of each source id; a map that exists is kept."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"target_id": id_map}), sink, compression="zstd")
    store.create(map_file, sink.getvalue().to_pybytes())
