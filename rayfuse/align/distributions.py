"""Distributions over source tokens -> distributions over target tokens, mass conserved.

Arrays have entries first and positions second, so that numpy works on long rows.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

LOWER, UPPER = 0, 1
"""Halves of a sort key, a little-endian int64: the probability above, rank and token below."""

ID_BITS = 24
"""Of the lower half, those of the token. The rank has the 8 above, enough for 255 entries and the
true token; capture.top_k goes no higher."""


@dataclass(frozen=True)
class TopEntries:
    """The head of a distribution at each position, and what is left."""

    ids: Int[np.ndarray, "entries positions"]
    """-1 where there is no entry."""
    probs: Float[np.ndarray, "entries positions"]
    """float32; 0 where there is no entry."""
    tail: Float[np.ndarray, " positions"]
    """Mass outside the entries: each position sums to 1 with it."""


def map_entries(
    entries: TopEntries, mapped_ids: Int[np.ndarray, "entries positions"]
) -> TopEntries:
    """Return entries with target ids; what has no counterpart joins the tail.

    Entries that meet on one target token still stand beside each other: see `merge_entries`.
    """
    lost = entries.probs * (mapped_ids < 0)
    return TopEntries(mapped_ids, entries.probs - lost, entries.tail + lost.sum(axis=0))


def find_renamed(
    mapped_ids: Int[np.ndarray, "entries positions"],
    has_entry: Bool[np.ndarray, "entries positions"],
) -> Bool[np.ndarray, " positions"]:
    """Return the positions where mapping gives every entry a token of its own.

    There nothing but the names has changed: not the order, nor any probability.

    Args:
        mapped_ids: Target ids, -1 for none.
        has_entry: Where there was an entry before mapping.
    """
    is_renamed = ((mapped_ids >= 0) == has_entry).all(axis=0)
    for later in range(1, len(mapped_ids)):
        is_equal = (mapped_ids[:later] == mapped_ids[later]).any(axis=0)
        is_renamed &= ~(is_equal & has_entry[later])
    return is_renamed


def put_true_token(
    entries: TopEntries,
    *,
    is_first_piece: Bool[np.ndarray, "entries positions"],
    first_probs: Float[np.ndarray, " positions"],
    continuation_probs: Float[np.ndarray, " positions"],
    true_ids: Int[np.ndarray, " positions"],
) -> TopEntries:
    """Return entries in which the token that really comes next has its chain probability.

    Where the target's token spans several source tokens, that is the product of theirs. The first
    piece's entry goes: its mass beyond the product joins the tail, since nobody knows which longer
    token it meant.

    Args:
        entries: In target ids.
        is_first_piece: The entry of the source token that really comes next, if there is one.
        first_probs: That token's probability; used where it has no entry and is part of the tail.
        continuation_probs: The product over the other source tokens that spell the target's
            token; 1 where there are none.
        true_ids: The target token that really comes next.

    Returns:
        One entry more: the last is the true token's where the first piece had none.
    """
    entry, at = np.nonzero(is_first_piece)
    first = np.zeros(len(true_ids), dtype=np.float32)
    first[at] = entries.probs[entry, at]
    true_probs = first * continuation_probs
    from_tail = np.minimum(first_probs, entries.tail) * continuation_probs * (first == 0)
    ids = np.concatenate([entries.ids, true_ids[None]])
    probs = np.concatenate([entries.probs, from_tail[None]])
    ids[entry, at], probs[entry, at] = true_ids[at], true_probs[at]
    tail = entries.tail + (first - true_probs) - from_tail
    return TopEntries(ids, probs, np.maximum(tail, np.float32(0)))


def merge_entries(
    entries: TopEntries, true_ids: Int[np.ndarray, " positions"]
) -> tuple[
    Int[np.ndarray, "positions fewer"],
    Float[np.ndarray, "positions fewer"],
    Float[np.ndarray, " positions"],
]:
    """Return ids, probabilities and tail with one entry fewer, likeliest first.

    Entries of one token are added up; of equals the earlier comes first. The least likely joins
    the tail, but never the true token, however unlikely it is: then the last but one does.
    Positions come first in the result, as they are stored; ids of empty entries are -1.
    """
    assert len(entries.ids) <= 1 << (32 - ID_BITS), "capture.top_k is bounded in the recipe"
    ids, probs = _add_equal_ids(entries.ids, entries.probs)
    keys = np.empty((*ids.T.shape, 2), dtype=np.int32)
    ranks = np.arange(len(ids), dtype=np.int32)[:, None] << ID_BITS
    keys[..., LOWER] = (ranks | (ids + np.int32(1))).T
    keys[..., UPPER] = ~probs.view(np.int32).T  # grows as the probability falls
    keys.view(np.int64)[..., 0].sort(axis=1)
    ids = (keys[..., LOWER] & ((1 << ID_BITS) - 1)) - np.int32(1)
    probs = (~keys[..., UPPER]).view(np.float32)
    is_last = (ids[:, -1] == true_ids) & (probs[:, -1] > 0)
    dropped = np.where(is_last, probs[:, -2], probs[:, -1])
    ids[is_last, -2], probs[is_last, -2] = ids[is_last, -1], probs[is_last, -1]
    kept = probs[:, :-1]
    return np.where(kept > 0, ids[:, :-1], np.int32(-1)), kept, entries.tail + dropped


def _add_equal_ids(
    ids: Int[np.ndarray, "entries positions"], probs: Float[np.ndarray, "entries positions"]
) -> tuple[Int[np.ndarray, "entries positions"], Float[np.ndarray, "entries positions"]]:
    """Return entries in which no token stands twice: the first has the sum, the others nothing."""
    ids, probs = ids.copy(), probs.copy()
    for later in range(1, len(ids)):
        same = ids[:later] == ids[later]
        probs[:later] += same * probs[later]
        is_moved = same.any(axis=0)
        probs[later, is_moved] = 0
        ids[later, is_moved] = -1
    return ids, probs
