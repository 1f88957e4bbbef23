"""Several aligned sources -> one distribution per target position, for one row.

The choice or the weights go by each source's cross-entropy, at each position over the text that it
is made for (`costs.py`): the same bytes for every source, so tokenizers compare (FuseLLM, arXiv
2401.10491, section 3.3, with bytes for tokens).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from rayfuse.config.fuse import FuseSettings


@dataclass(frozen=True)
class AlignedRow:
    """What one source says of a row, in the target's tokens."""

    has_signal: Bool[np.ndarray, " seq_len"]
    top_ids: Int[np.ndarray, "seq_len top_k"]
    top_probs: Float[np.ndarray, "seq_len top_k"]
    tail_probs: Float[np.ndarray, " seq_len"]
    costs: Float[np.ndarray, " seq_len"]
    """Cross-entropy over the text that the choice at each position is made for; where infinite, the
    source has nothing to say of it and is not heard, whatever `has_signal` says."""
    weight: float = 1.0
    """Its share of a mean is multiplied by it; 0 leaves it out."""


@dataclass(frozen=True)
class FusedRow:
    """One distribution per position: entries of distinct tokens, and the rest."""

    has_signal: Bool[np.ndarray, " seq_len"]
    top_ids: Int[np.ndarray, "seq_len entries"]
    """-1 where there is no entry; no token twice."""
    top_probs: Float[np.ndarray, "seq_len entries"]
    """0 where there is no entry; with the tail they sum to 1 where there is a signal."""
    tail_probs: Float[np.ndarray, " seq_len"]
    winners: Int[np.ndarray, " seq_len"]
    """The number of the source with the lowest cost of those heard; -1 where none is."""

    @staticmethod
    def of_nothing(seq_len: int) -> "FusedRow":
        """Return positions at which no source says anything."""
        return FusedRow(
            has_signal=np.zeros(seq_len, dtype=bool),
            top_ids=np.zeros((seq_len, 0), dtype=np.int32),
            top_probs=np.zeros((seq_len, 0), dtype=np.float32),
            tail_probs=np.zeros(seq_len, dtype=np.float32),
            winners=np.full(seq_len, -1, dtype=np.int16),
        )

    def widen(self, entries: int) -> "FusedRow":
        """Return the same with room for as many entries."""
        missing = entries - self.top_ids.shape[1]
        if not missing:
            return self
        room = ((0, 0), (0, missing))
        return replace(
            self,
            top_ids=np.pad(self.top_ids, room, constant_values=-1),
            top_probs=np.pad(self.top_probs, room),
        )


def fuse_row(sources: Sequence[AlignedRow], settings: FuseSettings) -> FusedRow:
    """Return one distribution per position from the sources that are heard there.

    A source is heard where it has a signal at a finite cost: an infinite one never wins against a
    finite one, has no share of a mean, and where no source has another there is no signal.

    Args:
        sources: All of the same row.
        settings: The method, its temperature, and what becomes of the tail.
    """
    heard = [source for source in sources if source.weight > 0]
    if not heard:
        return FusedRow.of_nothing(len(sources[0].has_signal))
    if settings.tail == "renormalise":
        heard = [_drop_tail(source) for source in heard]
    if settings.method == "min_ce":
        return _choose_source(heard)
    return _average_sources(heard, settings.temperature)


def _drop_tail(source: AlignedRow) -> AlignedRow:
    """Return a source whose head alone sums to 1; without a head there is no signal."""
    head = source.top_probs.sum(axis=1)
    scale = np.divide(1.0, head, out=np.zeros_like(head), where=head > 0)
    return AlignedRow(
        has_signal=source.has_signal & (head > 0),
        top_ids=source.top_ids,
        top_probs=source.top_probs * scale[:, None],
        tail_probs=np.zeros_like(source.tail_probs),
        costs=source.costs,
        weight=source.weight,
    )


def _choose_source(sources: Sequence[AlignedRow]) -> FusedRow:
    """Take at each position the source with the lowest cost of those heard there."""
    winners = choose_cheapest(_stack_costs(sources))
    best = sources[0]
    ids, probs, tail = best.top_ids.copy(), best.top_probs.copy(), best.tail_probs.copy()
    for number, source in enumerate(sources[1:], 1):
        wins = winners == number
        ids[wins], probs[wins] = source.top_ids[wins], source.top_probs[wins]
        tail[wins] = source.tail_probs[wins]
    return FusedRow(winners >= 0, ids, probs, tail, winners)


def give_tail_to(next_ids: Int[np.ndarray, " seq_len"], fused: FusedRow) -> FusedRow:
    """Return the same with the tail's mass added to the token that really comes next."""
    is_next = (fused.top_ids == next_ids[:, None]) & fused.has_signal[:, None]
    tail = fused.tail_probs * fused.has_signal
    is_new = fused.has_signal & ~is_next.any(axis=1)
    return replace(
        fused,
        top_ids=np.column_stack([fused.top_ids, np.where(is_new, next_ids, -1).astype(np.int32)]),
        top_probs=np.column_stack(
            [fused.top_probs + is_next * tail[:, None], np.where(is_new, tail, 0)]
        ),
        tail_probs=np.zeros_like(fused.tail_probs),
    )


def choose_cheapest(
    costs: Float[np.ndarray, "sources seq_len"],
) -> Int[np.ndarray, " seq_len"]:
    """Return the number of the source with the lowest cost; -1 where all are infinite.

    Ties go to the source that stands first in the recipe.
    """
    return np.where(np.isfinite(costs).any(axis=0), costs.argmin(axis=0), -1)


def _stack_costs(sources: Sequence[AlignedRow]) -> Float[np.ndarray, "num_sources seq_len"]:
    """Return the cost of each source at each position, infinite where it is not heard."""
    return np.stack([np.where(each.has_signal, each.costs, np.inf) for each in sources])


def _average_sources(sources: Sequence[AlignedRow], temperature: float) -> FusedRow:
    """Take the mean of the sources that are heard, weighted by softmax(-cost / temperature)."""
    costs = _stack_costs(sources)
    lowest = np.where(np.isfinite(costs).any(axis=0), costs.min(axis=0), 0.0)
    scores = np.exp(-(costs - lowest) / temperature)
    weights = scores * np.array([source.weight for source in sources])[:, None]
    total = weights.sum(axis=0)
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
    ids, probs = _add_equal_ids(np.where(probs > 0, ids, -1), probs)
    return FusedRow(total > 0, ids, probs, (tails * weights).sum(axis=0), choose_cheapest(costs))


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
