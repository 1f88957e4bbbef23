"""Distributions over source tokens -> distributions over target tokens, mass conserved."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class TopEntries:
    """The head of a distribution at each position, and what is left."""

    ids: Int[np.ndarray, "positions entries"]
    """-1 where there is no entry."""
    probs: Float[np.ndarray, "positions entries"]
    """0 where there is no entry."""
    tail: Float[np.ndarray, " positions"]
    """Mass outside the entries: each row sums to 1 with it."""


def map_entries(entries: TopEntries, vocab_map: Int[np.ndarray, " source_vocab"]) -> TopEntries:
    """Return entries with target ids; what has no counterpart joins the tail.

    Entries that meet on one target token still stand beside each other: see `merge_entries`.
    """
    ids = np.where(entries.ids >= 0, vocab_map[entries.ids], -1)
    probs = np.where(ids >= 0, entries.probs, 0.0)
    return TopEntries(ids, probs, entries.tail + (entries.probs - probs).sum(axis=1))


def put_true_token(
    entries: TopEntries,
    *,
    is_first_piece: Bool[np.ndarray, "positions entries"],
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
    """
    probs = np.where(is_first_piece, 0.0, entries.probs)
    removed = (entries.probs - probs).sum(axis=1)
    is_in_head = is_first_piece.any(axis=1)
    first = np.where(is_in_head, removed, np.minimum(first_probs, entries.tail))
    true_probs = first * continuation_probs
    tail = entries.tail + removed - true_probs
    ids = np.concatenate([np.where(probs > 0, entries.ids, -1), true_ids[:, None]], axis=1)
    probs = np.concatenate([probs, true_probs[:, None]], axis=1)
    return TopEntries(ids.astype(np.int32), probs, np.maximum(tail, 0.0))


def merge_entries(
    entries: TopEntries, num_entries: int, kept_ids: Int[np.ndarray, " positions"]
) -> TopEntries:
    """Return the likeliest `num_entries`, entries of one token added up; the rest joins the tail.

    Rows come out sorted, likeliest first; ids of empty entries are -1.

    Args:
        entries: A token may stand in several.
        num_entries: How many stay.
        kept_ids: The token of each position that stays however unlikely it is.
    """
    order = np.argsort(entries.ids, axis=1, kind="stable")
    ids = np.take_along_axis(entries.ids, order, axis=1)
    probs = np.take_along_axis(entries.probs, order, axis=1)
    is_new = np.ones(ids.shape, dtype=bool)
    is_new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    sums = np.add.reduceat(probs.reshape(-1), np.flatnonzero(is_new.reshape(-1)))
    merged = np.zeros_like(probs)
    merged[is_new] = sums
    merged[ids < 0] = 0.0
    is_kept = (ids == kept_ids[:, None]) & (merged > 0)
    chosen = np.argsort(-merged - is_kept, axis=1, kind="stable")[:, :num_entries]
    best_ids = np.take_along_axis(ids, chosen, axis=1)
    best_probs = np.take_along_axis(merged, chosen, axis=1)
    ranks = np.argsort(-best_probs, axis=1, kind="stable")  # the kept one came first
    best_ids = np.take_along_axis(best_ids, ranks, axis=1)
    best_probs = np.take_along_axis(best_probs, ranks, axis=1)
    dropped = merged.sum(axis=1) - best_probs.sum(axis=1)
    missing = num_entries - best_ids.shape[1]
    if missing > 0:
        best_ids = np.pad(best_ids, ((0, 0), (0, missing)), constant_values=-1)
        best_probs = np.pad(best_probs, ((0, 0), (0, missing)))
    best_ids = np.where(best_probs > 0, best_ids, -1).astype(np.int32)
    return TopEntries(best_ids, best_probs, entries.tail + np.maximum(dropped, 0.0))
