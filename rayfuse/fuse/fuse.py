"""Several aligned sources -> one distribution per target position, for one row.

The choice or the weights go by each source's cross-entropy over the whole row, in nats per byte:
the same bytes for every source, so tokenizers compare (FuseLLM, arXiv 2401.10491,
section 3.3, with bytes for tokens).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from rayfuse.recipe import FuseSettings


@dataclass(frozen=True)
class AlignedRow:
    """What one source says of a row, in the target's tokens."""

    has_signal: Bool[np.ndarray, " seq_len"]
    top_ids: Int[np.ndarray, "seq_len top_k"]
    top_probs: Float[np.ndarray, "seq_len top_k"]
    tail_probs: Float[np.ndarray, " seq_len"]
    nats_per_byte: float
    """Over the whole row; infinite if the source has nothing to say of it."""


@dataclass(frozen=True)
class FusedRow:
    """One distribution per position: entries of distinct tokens, and the rest."""

    has_signal: Bool[np.ndarray, " seq_len"]
    top_ids: Int[np.ndarray, "seq_len entries"]
    """-1 where there is no entry; no token twice."""
    top_probs: Float[np.ndarray, "seq_len entries"]
    """0 where there is no entry; with the tail they sum to 1 where there is a signal."""
    tail_probs: Float[np.ndarray, " seq_len"]


def fuse_row(sources: Sequence[AlignedRow], settings: FuseSettings) -> FusedRow:
    """Return one distribution per position from the sources that have a signal there.

    Args:
        sources: At least one, all of the same row.
        settings: The method and its temperature.
    """
    if settings.method == "min_ce":
        return _choose_source(sources)
    return _average_sources(sources, settings.temperature)


def _choose_source(sources: Sequence[AlignedRow]) -> FusedRow:
    """Take at each position the source with the lowest cross-entropy of those with a signal."""
    order = np.argsort([source.nats_per_byte for source in sources], kind="stable")
    ranked = [sources[index] for index in order]
    best = ranked[0]
    has_signal = best.has_signal.copy()
    ids, probs, tail = best.top_ids.copy(), best.top_probs.copy(), best.tail_probs.copy()
    for source in ranked[1:]:
        fills = source.has_signal & ~has_signal
        ids[fills], probs[fills] = source.top_ids[fills], source.top_probs[fills]
        tail[fills] = source.tail_probs[fills]
        has_signal |= fills
    return FusedRow(has_signal, ids, probs, tail)


def _average_sources(sources: Sequence[AlignedRow], temperature: float) -> FusedRow:
    """Take the mean of the sources with a signal, weighted by softmax(-nats per byte / T)."""
    costs = np.array([source.nats_per_byte for source in sources], dtype=np.float64)
    finite = np.isfinite(costs)
    lowest = costs[finite].min() if finite.any() else 0.0
    scores = np.where(finite, np.exp(-(np.where(finite, costs, 0.0) - lowest) / temperature), 0.0)
    signals = np.stack([source.has_signal for source in sources])  # num_sources seq_len
    weights = scores[:, None] * signals
    total = weights.sum(axis=0)
    has_signal = total > 0
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    ids = np.concatenate([source.top_ids for source in sources], axis=1)
    probs = np.concatenate(
        [
            source.top_probs * weight[:, None]
            for source, weight in zip(sources, weights, strict=True)
        ],
        axis=1,
    )
    tails = np.stack([source.tail_probs for source in sources])
    tail = (tails * weights).sum(axis=0)
    ids, probs = _add_equal_ids(np.where(probs > 0, ids, -1), probs)
    return FusedRow(has_signal, ids, probs, tail)


def _add_equal_ids(
    ids: Int[np.ndarray, "seq_len entries"], probs: Float[np.ndarray, "seq_len entries"]
) -> tuple[Int[np.ndarray, "seq_len entries"], Float[np.ndarray, "seq_len entries"]]:
    """Return entries in which no token stands twice: the first has the sum, the others nothing."""
    order = np.argsort(ids, axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, axis=1)
    probs = np.take_along_axis(probs, order, axis=1)
    is_first = np.ones(ids.shape, dtype=bool)
    is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    sums = np.zeros_like(probs)
    if probs.size:
        sums[is_first] = np.add.reduceat(probs.reshape(-1), np.flatnonzero(is_first.reshape(-1)))
    ids = np.where(is_first & (sums > 0), ids, -1)
    return ids, sums
