"""The readable form of fusion: decode every source, then choose or average. Only tests run it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from rayfuse.config.fuse import FuseSettings
from rayfuse.fuse.rules import make_empty, mix, select_lowest, weigh_by_nll
from rayfuse.storage.codec import TopK


@dataclass(frozen=True)
class AlignedSource:
    """One source's decoded distributions of a row, in the target's tokens."""

    has_signal: Bool[np.ndarray, " seq_len"]
    top: TopK
    nll: Float[np.ndarray, " seq_len"]
    """Where infinite the source is not active, whatever `has_signal` holds."""
    weight: float = 1.0


@dataclass(frozen=True)
class FusedSources:
    """One distribution per position, and the source with the lowest NLL there."""

    top: TopK
    selected: Int[np.ndarray, " seq_len"]

    @property
    def has_signal(self) -> Bool[np.ndarray, " seq_len"]:
        return self.selected >= 0


def fuse_sources(sources: Sequence[AlignedSource], settings: FuseSettings) -> FusedSources:
    """Fuse sources that all have as many entries."""
    active = [source for source in sources if source.weight > 0]
    if not active:
        seq_len = len(sources[0].has_signal)
        return FusedSources(make_empty(seq_len), np.full(seq_len, -1))
    if settings.tail == "renormalise":
        active = [_drop_tail(source) for source in active]
    nll = np.stack([np.where(source.has_signal, source.nll, np.inf) for source in active])
    selected = select_lowest(nll)
    tops = [source.top for source in active]
    if settings.method == "min_ce":
        return FusedSources(_choose(tops, selected), selected)
    assert settings.method == "avg_ce"
    shares = np.array([source.weight for source in active])
    return FusedSources(mix(tops, weigh_by_nll(nll, shares, settings.temperature)), selected)


def _choose(tops: Sequence[TopK], selected: Int[np.ndarray, " seq_len"]) -> TopK:
    ids, probs, tail = tops[0].ids.copy(), tops[0].probs.copy(), tops[0].tail.copy()
    for number, top in enumerate(tops):
        own = selected == number
        ids[own], probs[own], tail[own] = top.ids[own], top.probs[own], top.tail[own]
    return TopK(ids, probs, tail)


def _drop_tail(source: AlignedSource) -> AlignedSource:
    """Scale the head to 1; without a head there is no signal."""
    top = source.top
    head = top.probs.sum(axis=1)
    scale = np.divide(1.0, head, out=np.zeros_like(head), where=head > 0)
    scaled = TopK(top.ids, top.probs * scale[:, None], np.zeros_like(top.tail))
    return AlignedSource(source.has_signal & (head > 0), scaled, source.nll, source.weight)
