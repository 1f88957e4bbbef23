"""Distributions over source tokens -> distributions over target tokens.

Mass is conserved at every step: `map_entries` adds the mass of unmapped entries to the tail,
`put_true_token` adds to the tail what the true token's entry loses, `merge_entries` adds the mass
of the entry that it drops to the tail, and `_add_equal_ids` adds what it merges.

Arrays are [positions, entries] in every signature, but lie in memory entries first, so that numpy
works on long rows: the functions take their transposed views.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from rayfuse.storage.codec import TopK

LOWER, UPPER = 0, 1
"""Halves of a sort key, a little-endian int64: the probability above, rank and token below."""

ID_BITS = 24
"""Bits of the lower half that hold the token. The 8 above hold the rank, enough for 255 entries and
the true token; capture.top_k is bounded by it."""


def map_entries(top: TopK, mapped_ids: Int[np.ndarray, "positions entries"]) -> TopK:
    """Give entries their target ids; the mass of entries without one joins the tail.

    Entries that are mapped to one target token are not merged yet: see `merge_entries`.
    """
    lost = top.probs * (mapped_ids < 0)
    return TopK(mapped_ids, top.probs - lost, top.tail + lost.sum(axis=1))


def find_renamed(
    mapped_ids: Int[np.ndarray, "positions entries"],
    has_entry: Bool[np.ndarray, "positions entries"],
) -> Bool[np.ndarray, " positions"]:
    """Find the positions where mapping gives every entry a token of its own.

    At these, only ids change: neither the order of entries nor any probability.

    Args:
        mapped_ids: Target ids, -1 for none.
        has_entry: Where there was an entry before mapping.
    """
    ids, had_entry = mapped_ids.T, has_entry.T
    is_renamed = ((ids >= 0) == had_entry).all(axis=0)
    for later in range(1, len(ids)):
        is_equal = (ids[:later] == ids[later]).any(axis=0)
        is_renamed &= ~(is_equal & had_entry[later])
    return is_renamed


def put_true_token(
    top: TopK,
    *,
    is_first_piece: Bool[np.ndarray, "positions entries"],
    first_probs: Float[np.ndarray, " positions"],
    continuation_probs: Float[np.ndarray, " positions"],
    true_ids: Int[np.ndarray, " positions"],
) -> TopK:
    """Give the token that really comes next its chain probability.

    Where the target's token spans several source tokens, that is the product of theirs. The entry
    of the first piece becomes the true token's. Its mass beyond the product joins the tail, since
    the source does not record which other continuations it belongs to.

    Args:
        top: In target ids.
        is_first_piece: The entry of the source token that really comes next, if there is one.
        first_probs: That token's probability; used where it has no entry and is part of the tail.
        continuation_probs: The product over the other source tokens of the target's token; 1 where
            there are none.
        true_ids: The target token that really comes next.

    Returns:
        One entry more: the last is the true token's where the first piece had none.
    """
    entry, at = np.nonzero(is_first_piece.T)
    first = np.zeros(len(true_ids), dtype=np.float32)
    first[at] = top.probs.T[entry, at]
    true_probs = first * continuation_probs
    from_tail = np.minimum(first_probs, top.tail) * continuation_probs * (first == 0)
    ids = np.concatenate([top.ids.T, true_ids[None]])
    probs = np.concatenate([top.probs.T, from_tail[None]])
    ids[entry, at], probs[entry, at] = true_ids[at], true_probs[at]
    tail = top.tail + (first - true_probs) - from_tail
    return TopK(ids.T, probs.T, np.maximum(tail, np.float32(0)))


def merge_entries(top: TopK, true_ids: Int[np.ndarray, " positions"]) -> TopK:
    """Add up the entries of each token, sort them by probability, and drop the least likely one.

    Of equal probabilities the earlier entry comes first. The dropped entry's mass joins the tail.
    The true token is never dropped, however unlikely it is: then the last entry but one is. The
    result lies in memory positions first, as it is stored.
    """
    assert top.ids.shape[1] <= 1 << (32 - ID_BITS), "capture.top_k is bounded in the recipe"
    ids, probs = _add_equal_ids(top.ids.T, top.probs.T)
    # One int64 per entry holds probability, rank and token, so that a single sort, without an
    # index array and the gathers that it needs, orders all three.
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
    return TopK(np.where(kept > 0, ids[:, :-1], np.int32(-1)), kept, top.tail + dropped)


def _add_equal_ids(
    ids: Int[np.ndarray, "entries positions"], probs: Float[np.ndarray, "entries positions"]
) -> tuple[Int[np.ndarray, "entries positions"], Float[np.ndarray, "entries positions"]]:
    """Add up the entries of one token: its first entry holds the sum, its others become empty.

    Comparing all pairs keeps the entries' order, by which `merge_entries` breaks ties, and is fast
    for the few entries of one source. `fuse.rules` sorts, for the many of all sources.
    """
    ids, probs = ids.copy(), probs.copy()
    for later in range(1, len(ids)):
        same = ids[:later] == ids[later]
        probs[:later] += same * probs[later]
        is_moved = same.any(axis=0)
        probs[later, is_moved] = 0
        ids[later, is_moved] = -1
    return ids, probs
