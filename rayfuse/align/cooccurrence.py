"""The vocabulary map that a corpus itself shows: what each source token was matched to most often.

FuseChat, arXiv 2408.07990, section 3.2: statistics-based token alignment. Counts are kept sparse:
memory grows with the pairs that occur, never with the product of the vocabularies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from rayfuse.align.matches import match_positions
from rayfuse.align.token_spans import TokenBytes, place_tokens
from rayfuse.storage.codec import flatten_column

SOURCE_SHIFT = 32
"""A pair is one integer: source id above, target id below."""


@dataclass(frozen=True)
class PairCounts:
    """How often a source token and a target token began at the same byte."""

    pairs: Int[np.ndarray, " pairs"]
    """Distinct, sorted: source id * 2^32 + target id."""
    counts: Int[np.ndarray, " pairs"]


def count_pairs(corpus: pa.Table, source: TokenBytes, target: TokenBytes) -> PairCounts:
    """Return how often tokens began at the same byte in CORPUS rows.

    Args:
        corpus: Rows; their text is tokenised anew with the source's tokenizer.
        source: A vocabulary with its tokenizer.
        target: The vocabulary of `target_ids`.
    """
    assert source.tokenizer is not None
    texts: list[str] = corpus["text"].to_pylist()
    ends_document: list[bool] = corpus["ends_document"].to_pylist()
    rows = source.tokenizer.encode_rows(texts, ends_document)
    encoded = [text.encode() for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    ids = np.concatenate([np.zeros(0, dtype=np.int32), *rows])
    ours = place_tokens(ids, offsets, encoded, source, ends_document)
    theirs = place_tokens(*flatten_column(corpus, "target_ids"), encoded, target, ends_document)
    matches = match_positions(ours, theirs)
    same_blank = ours.next_has_blank[matches.source_at] == theirs.next_has_blank[matches.target_at]
    source_ids = ours.ids[matches.source_at[same_blank] + 1].astype(np.int64)
    target_ids = theirs.ids[matches.target_at[same_blank] + 1]
    return add_counts(
        [PairCounts((source_ids << SOURCE_SHIFT) | target_ids, np.ones_like(source_ids))]
    )


def add_counts(parts: Sequence[PairCounts]) -> PairCounts:
    """Return the sum of counts."""
    pairs = np.concatenate([np.zeros(0, dtype=np.int64), *(part.pairs for part in parts)])
    counts = np.concatenate([np.zeros(0, dtype=np.int64), *(part.counts for part in parts)])
    distinct, places = np.unique(pairs, return_inverse=True)
    sums = np.bincount(places, weights=counts, minlength=len(distinct)).astype(np.int64)
    return PairCounts(distinct, sums)


def choose_most_matched(
    counted: PairCounts, unseen: Int[np.ndarray, " source_vocab"]
) -> Int[np.ndarray, " source_vocab"]:
    """Return for each source token the target token it was matched to most often.

    Args:
        counted: Over the whole corpus; of equal counts the lowest target id wins.
        unseen: The map of tokens that the corpus does not have.
    """
    source_ids = counted.pairs >> SOURCE_SHIFT
    target_ids = counted.pairs & ((1 << SOURCE_SHIFT) - 1)
    order = np.lexsort((target_ids, -counted.counts, source_ids))
    sources, firsts = np.unique(source_ids[order], return_index=True)
    mapped = unseen.copy()
    mapped[sources] = target_ids[order][firsts]
    return mapped
