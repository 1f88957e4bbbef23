"""Held-out documents whose text is also in the corpus: runs of 13 equal words, as in GPT-3's check.

Words are compared without case and punctuation (arXiv 2005.14165, appendix C). In scripts that
write no spaces between words, each character counts as one. A document of fewer words has no run:
it is not compared.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator
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
    """How many held-out documents share a run of words with the corpus."""

    documents: int
    """Held-out documents that were compared: those of at least `RUN_WORDS` words."""
    shared: int
    """Those of them that share a run."""
    shards_read: int
    """Of the corpus."""
    num_shards: int

    @property
    def share(self) -> float:
        """The shared documents among all that were compared."""
        return self.shared / self.documents if self.documents else 0.0


def find_overlap(corpus: DataSet, held_out: DataSet) -> Overlap:
    """Compare the first `MAX_SHARDS` shards of a corpus and of its held-out documents.

    Raises:
        ShardError: A shard is missing or corrupt.
    """
    runs: list[UInt64[np.ndarray, " _"]] = []
    owners: list[Int[np.ndarray, " _"]] = []
    documents = 0
    for text in _iterate_documents(held_out):
        found = hash_runs(text)
        runs.append(found)
        owners.append(np.full(len(found), documents))
        documents += len(found) > 0
    known, owner = (
        np.concatenate([np.zeros(0, np.uint64), *runs]),
        np.concatenate([[0], *owners])[1:],
    )
    wanted = np.unique(known)
    is_shared = np.zeros(len(wanted), dtype=bool)
    for text in _iterate_documents(corpus) if len(wanted) else ():
        found = hash_runs(text)
        at = np.searchsorted(wanted, found).clip(max=len(wanted) - 1)
        is_shared[at[wanted[at] == found]] = True
    hits = np.isin(known, wanted[is_shared])
    num_shards = len(corpus.commits())
    return Overlap(documents, len(np.unique(owner[hits])), min(num_shards, MAX_SHARDS), num_shards)


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
