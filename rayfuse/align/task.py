"""Aligning one committed shard: read, align, commit. Run by the capture and the align stage."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import pyarrow as pa
import pyarrow.parquet as pq

from rayfuse.align.answers import align_answers, tokenize_answers
from rayfuse.align.method import Alignment, IdMap, build_alignment
from rayfuse.align.shard import align_shard
from rayfuse.align.vocab_map import VocabMaps, build_maps
from rayfuse.config.models import ModelSettings, SourceSettings
from rayfuse.config.recipe import Recipe
from rayfuse.models.chat import load_chat_format
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.models.tokenizer import TextTokenizer
from rayfuse.run.layout import Layout
from rayfuse.runtime.metrics import count_work
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.files import hash_bytes, read_listed, write_record
from rayfuse.storage.manifest import Commit, check_inputs, list_changed_inputs
from rayfuse.storage.parquet import read_parquet
from rayfuse.storage.seal import REMEDY, ShardError
from rayfuse.storage.store import Store

MAP = "map"
"""The vocabulary map among the inputs of an aligned shard."""


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
    inside_tokens: bool = False
    """`align.inside_tokens`."""
    is_chat: bool = False
    """The rows are conversations."""

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
        inside_tokens=recipe.align.inside_tokens,
        is_chat=recipe.corpus.is_chat,
    )


def plan_align_step(
    recipe: Recipe, layout: Layout, source: SourceSettings
) -> Callable[[int], None]:
    """Plan the step that aligns a shard of one source right after it is captured.

    The step takes the shard's number and can be pickled. It keeps a shard that is aligned already
    from the same rows.
    """
    return partial(_align_if_missing, plan_task(recipe, layout, source))


def _align_if_missing(task: AlignTask, shard: int) -> None:
    if task.aligned.is_committed(shard):
        inputs = {data.stage: data.read_commit(shard) for data in (task.corpus, task.captured)}
        if not list_changed_inputs(task.aligned.read_commit(shard), inputs):
            return
        task.aligned.drop_shards([shard])
    align_committed(task, shard)


def align_committed(task: AlignTask, shard: int) -> Commit:
    """Align a captured shard, store the result and return its commit.

    Raises:
        ShardError: As for `align_captured`.
    """
    began = time.monotonic()
    table, stats, inputs = align_captured(task, shard)
    tokens = int(stats["positions"])
    commit = task.aligned.write_shard(shard, table, tokens=tokens, stats=stats, inputs=inputs)
    seconds = time.monotonic() - began
    count_work("align", task.name, rows=commit.rows, tokens=tokens, seconds=seconds)
    return commit


def align_captured(
    task: AlignTask, shard: int
) -> tuple[pa.Table, dict[str, float], dict[str, str]]:
    """Align a captured shard, without storing it; return ALIGNED rows, their sums, and the inputs.

    Raises:
        ShardError: A shard that is read is missing or corrupt, or the captured shard does not
            belong to the corpus shard; then the message names the shard, the row and, where it
            can, the position.
    """
    corpus_commit, commit = task.corpus.read_commit(shard), task.captured.read_commit(shard)
    check_inputs(commit, {"corpus": corpus_commit}, task.captured.folder)
    corpus = task.corpus.read_shard(corpus_commit)
    captured = task.captured.read_shard(commit)
    # Frozen pydantic models do hash; the type checker does not know.
    alignment, map_sha256 = load_alignment(task)  # pyright: ignore[reportArgumentType]
    inputs = {"corpus": corpus_commit.identity, "captured": commit.identity}
    inputs |= {MAP: map_sha256} if map_sha256 else {}
    try:
        align = align_answers if task.is_chat else align_shard
        return (*align(corpus, captured, alignment), inputs)
    except ValueError as error:
        name = f"{task.captured.folder}/{commit.file}"
        raise ShardError(f"{name}: {error}; remove it and capture the shard again") from error


@lru_cache(maxsize=8)
def load_alignment(task: AlignTask) -> tuple[Alignment, str]:
    """Load both vocabularies and the vocabulary map of a task; once per process and task.

    Returns:
        What aligns the rows, and the sha256 of the vocabulary map: empty for methods without one.

    Raises:
        FileNotFoundError: The method's vocabulary map is not stored yet.
        ShardError: It is corrupt.
    """
    source, target = (
        tokenize_answers(load_chat_format(model)) if task.is_chat else load_recipe_tokenizer(model)
        for model in (task.source, task.target)
    )
    build = partial(build_alignment, source, target, task.method, inside_tokens=task.inside_tokens)
    if task.map_file is None:
        return build(), ""
    content = read_map(task.aligned.store, task.map_file)
    maps = decode_map(content, task.map_file, source, target)
    return build(maps=maps), hash_bytes(content)["sha256"]


def record_of_map(map_file: str) -> str:
    """Name the record of a stored vocabulary map, which holds its size and sha256."""
    return map_file.removesuffix(".parquet") + ".json"


def read_map(store: Store, map_file: str) -> bytes:
    """Read a stored vocabulary map, and check every byte of it.

    Raises:
        FileNotFoundError: It is not stored yet.
        ShardError: It is corrupt.
    """
    return read_listed(store, record_of_map(map_file), map_file.removeprefix("maps/"))


def decode_map(
    content: bytes, map_file: str, source: TextTokenizer, target: TextTokenizer
) -> VocabMaps:
    """Decode a stored vocabulary map, and build the three maps from it.

    Raises:
        ShardError: It is not a map from the one vocabulary to the other.
    """
    try:
        column = read_parquet(content)["target_id"]
    except (KeyError, pa.ArrowException) as error:
        raise ShardError(f"{map_file} is no vocabulary map ({error}); {REMEDY}") from error
    if not pa.types.is_integer(column.type) or len(column) != source.vocab_size:
        raise ShardError(
            f"{map_file} maps {len(column)} tokens to values of type {column.type}, but the source "
            f"has {source.vocab_size} tokens, and target ids are integers; {REMEDY}"
        )
    plain = column.to_numpy()
    if plain.min() < -1 or plain.max() >= target.vocab_size:
        raise ShardError(
            f"{map_file} has ids from {plain.min()} to {plain.max()}, but the target has "
            f"{target.vocab_size}; {REMEDY}"
        )
    return build_maps(plain, source, target)


def encode_map(id_map: IdMap) -> bytes:
    """Encode a vocabulary map, the target id of each source id."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"target_id": id_map}), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def write_map_record(store: Store, map_file: str, content: bytes) -> None:
    """Write the record of a vocabulary map that is stored."""
    files = {map_file.removeprefix("maps/"): hash_bytes(content)}
    write_record(store, record_of_map(map_file), {}, files)
