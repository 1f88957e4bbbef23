"""Fusion rules: several aligned sources -> one distribution per target position.

Every rule compares sources by their cross-entropy, at each position over the text that the choice
is made for (`nll.py`): the same bytes for every source, so that tokenizers compare (FuseLLM, arXiv
2401.10491, section 3.3, with bytes for tokens). A rule is a function that
`rayfuse.config.fuse.RULES` lists.

Mass is conserved: `OpenSource.read` scales each source's entries to one minus its tail, a selected
source is copied, a mean has weights that sum to 1, and `_mix_into` adds up equal tokens.
"""

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import no_type_check

import numba
import numpy as np
from jaxtyping import Bool, Float, Int

from rayfuse.config.fuse import RULES, FuseSettings
from rayfuse.storage.codec import PROB_OF_CODE, EncodedTopK, TopK


@dataclass(frozen=True)
class OpenSource:
    """One source's aligned distributions of a shard, as stored, and its cross-entropy there."""

    top: EncodedTopK
    nll: Float[np.ndarray, " tokens"]
    """Cross-entropy over the text that the choice at each position is made for; infinite where the
    source is not active: it has no signal there, or it rejected the row."""
    weight: float = 1.0
    """Multiplies the source's share of a mean; above 0."""

    def read(self, at: Int[np.ndarray, " positions"], settings: FuseSettings) -> TopK:
        """Decode the distributions of some positions."""
        top = make_empty(len(at), self.top.ids.shape[1])
        self.read_into(top, np.arange(len(at)), at, settings)
        return top

    def read_into(
        self,
        top: TopK,
        places: Int[np.ndarray, " positions"],
        at: Int[np.ndarray, " positions"],
        settings: FuseSettings,
    ) -> None:
        """Decode the distributions of some positions to some places of a result."""
        tail_logprobs = self.read_tail(at, settings)
        top.tail[places] = np.exp(tail_logprobs)
        _decode_into(
            *(at, places, self.top.ids, self.top.codes, -np.expm1(tail_logprobs)),
            *(PROB_OF_CODE, top.ids, top.probs),
        )

    def read_tail(
        self, at: Int[np.ndarray, " positions"], settings: FuseSettings
    ) -> Float[np.ndarray, " positions"]:
        """Return the log of the mass outside the entries as fusion uses it.

        The setting `tail: renormalise` empties the tail here, and nowhere else: decoding scales
        the entries to the mass that the tail does not have.
        """
        if settings.tail == "renormalise":
            return np.full(len(at), -np.inf, dtype=np.float32)
        return self.top.tail_logprobs.take(at).astype(np.float32)


FusionRule = Callable[
    [
        Sequence[OpenSource],
        Int[np.ndarray, " positions"],
        Int[np.ndarray, " positions"],
        FuseSettings,
    ],
    TopK,
]
"""Fuses the active sources at some positions of a shard.

Its arguments: the sources, the position numbers, the number of the source with the lowest
cross-entropy at each of them (-1 where none is active), and the settings. In its result no token
has two entries at one position, and positions without an active source are empty, tail 0."""


def load_rule(name: str) -> FusionRule:
    """Import a registered rule.

    Args:
        name: A key of `RULES`, as the recipe's `fuse.method` was checked to be.
    """
    return pkgutil.resolve_name(RULES[name])


def take_selected(
    sources: Sequence[OpenSource],
    at: Int[np.ndarray, " positions"],
    selected: Int[np.ndarray, " positions"],
    settings: FuseSettings,
) -> TopK:
    """Take at each position the distribution of the selected source (`min_ce`, FuseLLM's MinCE).

    Only that source is decoded, straight to its place in the result. tests/fuse/oracle.py is the
    readable form, which decodes all sources and then chooses.
    """
    entries = max((source.top.ids.shape[1] for source in sources), default=0)
    fused = make_empty(len(at), entries)
    for number, source in enumerate(sources):
        own = np.flatnonzero(selected == number)
        source.read_into(fused, own, at[own], settings)
    return fused


def average(
    sources: Sequence[OpenSource],
    at: Int[np.ndarray, " positions"],
    selected: Int[np.ndarray, " positions"],
    settings: FuseSettings,
) -> TopK:
    """Take the mean of the active sources, weighted by their NLL (`avg_ce`, FuseLLM's AvgCE)."""
    del selected  # every active source has a share
    shares = np.array([source.weight for source in sources])
    return _average(sources, at, settings, shares=shares, temperature=settings.temperature)


def average_by_posterior(
    sources: Sequence[OpenSource],
    at: Int[np.ndarray, " positions"],
    selected: Int[np.ndarray, " positions"],
    settings: FuseSettings,
) -> TopK:
    """Take the mean of the active sources, weighted by the text before it (`fixed_share`).

    The `nll` of these sources is -log of their posterior weight (`posterior.py`).
    """
    del selected
    return _average(sources, at, settings, shares=np.ones(len(sources)), temperature=1.0)


def _average(
    sources: Sequence[OpenSource],
    at: Int[np.ndarray, " positions"],
    settings: FuseSettings,
    *,
    shares: Float[np.ndarray, " num_sources"],
    temperature: float,
) -> TopK:
    nll = np.stack([source.nll.take(at) for source in sources])
    weights = weigh_by_nll(nll, shares, temperature)
    return mix([source.read(at, settings) for source in sources], weights)


def select_lowest(nll: Float[np.ndarray, "num_sources positions"]) -> Int[np.ndarray, " positions"]:
    """Select the source with the lowest NLL at each position; -1 where all are infinite.

    Ties go to the source that stands first in the recipe.
    """
    return np.where(np.isfinite(nll).any(axis=0), nll.argmin(axis=0), -1)


def weigh_by_nll(
    nll: Float[np.ndarray, "num_sources positions"],
    shares: Float[np.ndarray, " num_sources"],
    temperature: float,
) -> Float[np.ndarray, "num_sources positions"]:
    """Weigh sources by share * softmax(-nll / temperature); weights sum to 1, or are all 0.

    Args:
        nll: In nats per byte or token; infinite where a source is not active.
        shares: What each source's weight is multiplied by, above 0.
        temperature: Above 0. The lower, the nearer to selecting the source with the lowest NLL.
    """
    lowest = np.where(np.isfinite(nll).any(axis=0), nll.min(axis=0), 0.0)
    weights = np.exp(-(nll - lowest) / temperature) * shares[:, None]
    total = weights.sum(axis=0)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def mix(tops: Sequence[TopK], weights: Float[np.ndarray, "num_sources positions"]) -> TopK:
    """Add up distributions times their weights, with one entry per token.

    Args:
        tops: The sources' distributions.
        weights: Their weights, which sum to 1, or are all 0.
    """
    ids = np.concatenate([top.ids for top in tops], axis=1)
    probs = np.concatenate([top.probs for top in tops], axis=1, dtype=np.float32)
    tails = np.stack([top.tail for top in tops]).astype(np.float32)
    stops = np.cumsum([top.ids.shape[1] for top in tops])
    mixed = make_empty(*ids.shape)
    _mix_into(ids, probs, tails, weights, stops, (mixed.ids, mixed.probs, mixed.tail))
    return mixed


def give_tail_to(
    next_ids: Int[np.ndarray, " positions"], top: TopK, has_signal: Bool[np.ndarray, " positions"]
) -> TopK:
    """Add the tail's mass to the token that really comes next (`tail: truth`); the tail is then 0.

    The result has one entry more, used where that token has none yet.
    """
    is_next = (top.ids == next_ids[:, None]) & has_signal[:, None]
    tail = top.tail * has_signal
    is_new = has_signal & ~is_next.any(axis=1)
    return TopK(
        ids=np.column_stack([top.ids, np.where(is_new, next_ids, -1).astype(np.int32)]),
        probs=np.column_stack([top.probs + is_next * tail[:, None], np.where(is_new, tail, 0)]),
        tail=np.zeros_like(top.tail),
    )


def make_empty(positions: int, entries: int = 0) -> TopK:
    """Make distributions without any mass, for positions without an active source."""
    return TopK(
        ids=np.full((positions, entries), -1, dtype=np.int32),
        probs=np.zeros((positions, entries), dtype=np.float32),
        tail=np.zeros(positions, dtype=np.float32),
    )


@numba.njit(cache=True)
@no_type_check
def _mix_into(ids, probs, tails, weights, stops, mixed):
    """Mix the distributions of each position into `mixed`: entries of one token are added up.

    `slots` has the place of a token among the entries so far. It is never cleared: a place counts
    only if the token stands there.
    """
    mixed_ids, mixed_probs, mixed_tails = mixed
    slots = np.zeros(max(ids.max(), 0) + 1 if ids.size else 1, dtype=np.int32)
    for at in range(len(ids)):
        used, tail, start = 0, 0.0, 0
        for source in range(len(stops)):
            stop, weight = stops[source], weights[source, at]
            tail += weight * tails[source, at]
            for entry in range(start, stop):
                token, prob = ids[at, entry], weight * probs[at, entry]
                if token < 0 or prob <= 0:
                    continue
                place = slots[token]
                if place >= used or mixed_ids[at, place] != token:
                    place, used = used, used + 1
                    slots[token], mixed_ids[at, place] = place, token
                mixed_probs[at, place] += prob
            start = stop
        mixed_tails[at] = tail


@numba.njit(cache=True)
@no_type_check
def _decode_into(  # noqa: PLR0917 (compiled)
    at, to, top_ids, codes, head_masses, prob_of_code, ids, probs
):
    """Decode the entries of the positions `at`, as `decode_probs` does, into the rows `to`.

    One pass in place of the five of numpy, and without a copy of the codes. tests/fuse compares
    the two: the sums of a head are formed in the same order, so they are equal to float32.
    """
    for place in range(len(at)):
        position, row = at[place], to[place]
        level, total = np.uint8(0), np.float32(0)
        for entry in range(top_ids.shape[1]):
            level = np.uint8(level + codes[position, entry])
            token_id = top_ids[position, entry]
            prob = prob_of_code[level] if token_id >= 0 else np.float32(0)
            ids[row, entry], probs[row, entry] = token_id, prob
            total += prob
        scale = head_masses[place] / max(total, np.float32(1e-30))
        for entry in range(top_ids.shape[1]):
            probs[row, entry] *= scale
