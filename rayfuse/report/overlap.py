"""Texts of an evaluation that are also in the corpus: runs of 13 equal words, as in GPT-3's check.

Words are compared without case and punctuation (arXiv 2005.14165, appendix C). In scripts that
write no spaces between words, each character counts as one. A text of fewer words has no run: it is
not compared.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
from jaxtyping import Int, UInt64

from rayfuse.storage.codec import number_documents
from rayfuse.storage.dataset import DataSet

RUN_WORDS = 13

MAX_SHARDS = 16
"""Shards of each data set that are compared: 16 million tokens by default, some 10 s."""

CACHED_WORDS = 2**20

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese, as ranges of a character class."""

_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")

_FACTORS = np.array(
    [pow(0x9E3779B97F4A7C15, place, 2**64) for place in range(RUN_WORDS)], np.uint64
)
"""Of the polynomial hash of a run, modulo 2^64."""


@dataclass(frozen=True)
class Overlap:
    """How many held-out documents, or questions, share a run of words with the corpus."""

    documents: int
    """Those that were compared: of at least `RUN_WORDS` words."""
    shared: int
    """Those of them that share a run."""
    shards_read: int
    """Of the corpus."""
    num_shards: int

    @property
    def share(self) -> float:
        """The shared documents among all that were compared."""
        return self.shared / self.documents if self.documents else 0.0


def find_overlaps(
    corpus: DataSet, held_out: DataSet, questions: Mapping[str, Iterable[str]]
) -> tuple[Overlap, dict[str, Overlap]]:
    """Compare held-out documents and the questions of tasks with a corpus, in one pass over it.

    Of each data set the first `MAX_SHARDS` shards are compared.

    Args:
        corpus: The corpus.
        held_out: The held-out documents.
        questions: The texts of each task.

    Returns:
        The overlap of the held-out documents, and of each task.

    Raises:
        ShardError: A shard is missing or corrupt.
    """
    groups = [_hash_texts(_iterate_documents(held_out)), *map(_hash_texts, questions.values())]
    wanted = np.unique(np.concatenate([found.runs for found in groups]))
    is_shared = np.zeros(len(wanted), dtype=bool)
    for text in _iterate_documents(corpus) if len(wanted) else ():
        found = hash_runs(text)
        at = np.searchsorted(wanted, found).clip(max=len(wanted) - 1)
        is_shared[at[wanted[at] == found]] = True
    shared, num_shards = wanted[is_shared], len(corpus.commits())
    of_held_out, *of_tasks = (
        Overlap(
            len(np.unique(found.owners)),
            len(np.unique(found.owners[np.isin(found.runs, shared)])),
            min(num_shards, MAX_SHARDS),
            num_shards,
        )
        for found in groups
    )
    return of_held_out, dict(zip(questions, of_tasks, strict=True))


@dataclass(frozen=True)
class _HashedTexts:
    """The runs of some texts."""

    runs: UInt64[np.ndarray, " runs"]
    owners: Int[np.ndarray, " runs"]
    """The number of the text that each run is from."""


def _hash_texts(texts: Iterable[str]) -> _HashedTexts:
    runs = [hash_runs(text) for text in texts]
    numbers = np.repeat(np.arange(len(runs)), [len(found) for found in runs])
    return _HashedTexts(np.concatenate([np.zeros(0, np.uint64), *runs]), numbers)


def hash_runs(text: str) -> UInt64[np.ndarray, " runs"]:
    """Hash each run of `RUN_WORDS` words of a text; none if it has fewer words."""
    words = np.array([_hash_word(word) for word in _WORD.findall(text.lower())], dtype=np.uint64)
    if len(words) < RUN_WORDS:
        return np.zeros(0, dtype=np.uint64)
    return np.lib.stride_tricks.sliding_window_view(words, RUN_WORDS) @ _FACTORS


@lru_cache(CACHED_WORDS)
def _hash_word(word: str) -> int:
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _iterate_documents(data: DataSet) -> Iterator[str]:
    """Yield the text of each document, its rows joined, shard by shard."""
    commits = data.commits()
    for shard in sorted(commits)[:MAX_SHARDS]:
        rows = data.read_shard(commits[shard], columns=["text", "ends_document"])
        yield from _join_rows(rows)


def _join_rows(rows: pa.Table) -> Iterator[str]:
    numbers = number_documents(rows)
    texts: list[str] = rows["text"].to_pylist()
    starts = np.flatnonzero(np.diff(numbers, prepend=-1)).tolist()
    for start, stop in itertools.pairwise([*starts, len(texts)]):
        yield "".join(texts[start:stop])
