"""Aligning one committed shard: read, align, commit. Run by the capture and the align stage."""

from dataclasses import dataclass
from functools import lru_cache

from rayfuse.align.shard import Alignment, align_shard, build_alignment
from rayfuse.model_files import load_recipe_tokenizer
from rayfuse.recipe import ModelSettings
from rayfuse.storage.dataset import Commit, DataSet


@dataclass(frozen=True)
class AlignTask:
    """Where one source's shards come from and go to."""

    source: ModelSettings
    target: ModelSettings
    corpus: DataSet
    captured: DataSet
    aligned: DataSet


def align_committed(task: AlignTask, shard: int) -> Commit:
    """Align a captured shard and return its commit.

    Raises:
        ShardError: A shard that is read is missing or damaged.
        ValueError: The captured shard holds other rows than the corpus shard.
    """
    corpus = task.corpus.read_shard(task.corpus.read_commit(shard))
    captured = task.captured.read_shard(task.captured.read_commit(shard))
    # Frozen pydantic models do hash; the type checker does not know.
    alignment = _load_alignment(task.source, task.target)  # pyright: ignore[reportArgumentType]
    table, stats = align_shard(corpus, captured, alignment)
    return task.aligned.write_shard(shard, table, tokens=int(stats["positions"]), stats=stats)


@lru_cache(maxsize=8)
def _load_alignment(source: ModelSettings, target: ModelSettings) -> Alignment:
    return build_alignment(load_recipe_tokenizer(source), load_recipe_tokenizer(target))
