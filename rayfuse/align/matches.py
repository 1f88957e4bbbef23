"""Pairs target positions with the source positions that they learn from."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, UInt8

from rayfuse.align.token_spans import Fault, PlacedTokens

NO_SHARED_BOUNDARY = "no shared boundary"
"""The position is inside a source token."""

NO_TOKENS = "source: row rejected or left out"
ONE_SIDED = "start or end that one side alone predicts"
"""A model without start token predicts no first token of a text, one without EOS no end."""


@dataclass(frozen=True)
class Matches:
    """Target positions, the source positions they learn from, and why the others have none."""

    target_at: Int[np.ndarray, " matches"]
    source_at: Int[np.ndarray, " matches"]
    source_stop: Int[np.ndarray, " matches"]
    """The source position that starts where the target's next token ends, or the first beyond."""
    unmatched: dict[str, int]
    """Target positions without a match, by reason."""

    def part(self, part: slice) -> "Matches":
        """Select consecutive matches, without the counts of unmatched positions."""
        return Matches(
            self.target_at[part], self.source_at[part], self.source_stop[part], unmatched={}
        )

    def select(self, kept: Bool[np.ndarray, " matches"], reason: str) -> "Matches":
        """Keep some of the matches, and count the others under a reason."""
        dropped = int((~kept).sum())
        unmatched = self.unmatched | {reason: self.unmatched.get(reason, 0) + dropped}
        return Matches(
            self.target_at[kept],
            self.source_at[kept],
            self.source_stop[kept],
            {name: count for name, count in unmatched.items() if count},
        )


def match_positions(source: PlacedTokens, target: PlacedTokens) -> Matches:
    """Match the target positions that start at the same byte as a source position.

    Both models predict the same bytes there. All source tokens from there to the end of the
    target's next token must spell the text, so that their probabilities multiply to its own.
    """
    target_at = np.flatnonzero(target.has_next)
    if not len(source.ids) or not len(target_at):
        none = np.zeros(0, dtype=np.int64)
        return Matches(none, none, none, {NO_TOKENS: len(target_at)} if len(target_at) else {})
    source_at = _find_same_byte(source, target, target_at)
    is_shared = (source_at >= 0) & (source.next_is_eos[source_at] == target.next_is_eos[target_at])
    stops = target.ends[np.minimum(target_at + 1, len(target.ends) - 1)]
    source_stop = np.searchsorted(source.ends, stops)
    # A target token within one source token, and EOS, have a chain of that one token.
    source_stop = np.minimum(np.maximum(source_stop, source_at + 1), len(source.ends) - 1)
    faults_before = np.concatenate([[0], np.cumsum(source.faults > 0)])
    is_broken = faults_before[source_stop] > faults_before[source_at]
    is_dropped = _is_within(stops, source.dropped) & ~target.next_is_eos[target_at]
    is_target_sound = target.faults[target_at] == Fault.NONE
    kept = is_shared & is_target_sound & ~is_broken & ~is_dropped
    faults = _first_fault(source, source_at)
    faults[is_dropped & ~is_broken] = Fault.DROPPED_TEXT
    reasons = _count_faults("target", target.faults[target_at])
    reasons += _count_faults("source", faults[is_shared & is_target_sound & ~kept])
    reasons += _explain_unshared(source, target, target_at[is_target_sound & ~is_shared])
    return Matches(target_at[kept], source_at[kept], source_stop[kept], dict(reasons))


def keep_one_to_one(matches: Matches, source: PlacedTokens, target: PlacedTokens) -> Matches:
    """Keep the matches where one source token spells exactly the target's next token."""
    is_single = matches.source_stop == matches.source_at + 1
    same_end = source.ends[matches.source_stop] == target.ends[matches.target_at + 1]
    return matches.select(is_single & same_end, "not one token to one")


def _find_same_byte(
    source: PlacedTokens, target: PlacedTokens, target_at: Int[np.ndarray, " positions"]
) -> Int[np.ndarray, " positions"]:
    """Find the source position that starts where each target position does, -1 where none does.

    Two start at one byte where a token is nothing but a prefix space that the text does not have:
    one before that token, one after it. The target's position is paired with the one of its kind.
    """
    last_byte = max(source.ends.max(initial=0), target.ends.max(initial=0))
    bytes_of_target = target.ends[target_at]
    has_prefix_space = target.next_has_prefix_space[target_at]
    found: list[np.ndarray] = []
    for kind in (False, True):
        at = np.flatnonzero(source.has_next & (source.next_has_prefix_space == kind))
        index = np.full(int(last_byte) + 1, -1, dtype=np.int64)
        index[source.ends[at]] = at
        found.append(index[bytes_of_target])
    same, other = np.where(has_prefix_space, found[::-1], found)
    return np.where(same >= 0, same, other)


def _explain_unshared(
    source: PlacedTokens, target: PlacedTokens, target_at: Int[np.ndarray, " positions"]
) -> Counter[str]:
    """Count the target positions that share no source position's byte, by the reason."""
    row = np.searchsorted(target.offsets, target_at, side="right") - 1
    firsts, stops = source.offsets[row], source.offsets[row + 1]
    byte, is_end = target.ends[target_at], target.next_is_eos[target_at]
    # The first source token that does not end before this byte, and where it begins.
    covering = np.minimum(np.searchsorted(source.ends, byte), len(source.ends) - 1)
    begins = np.where(covering > firsts, source.ends[covering - 1], source.row_starts[row])
    is_inside = (covering < stops) & (begins < byte) & (byte < source.ends[covering])
    is_dropped = _is_within(byte + 1, source.dropped) | (is_end & _is_within(byte, source.dropped))
    reasons = {
        NO_TOKENS: firsts == stops,
        f"source: {Fault.DROPPED_TEXT.reason}": is_dropped,
        f"target: {Fault.DROPPED_TEXT.reason}": is_end & _is_within(byte + 1, target.dropped),
        NO_SHARED_BOUNDARY: is_inside,
    }
    found = np.select(list(reasons.values()), np.arange(len(reasons)), len(reasons))
    counts = np.bincount(found, minlength=len(reasons) + 1).tolist()
    return Counter(dict(zip([*reasons, ONE_SIDED], counts, strict=True)))


def _is_within(
    stops: Int[np.ndarray, " positions"], gaps: Int[np.ndarray, "gaps 2"]
) -> Bool[np.ndarray, " positions"]:
    """Find the stops that lie in a gap, beyond its first byte."""
    if not len(gaps):
        return np.zeros(len(stops), dtype=bool)
    gap = np.searchsorted(gaps[:, 0], stops) - 1
    return (gap >= 0) & (stops <= gaps[gap, 1])


def _first_fault(
    source: PlacedTokens, at: Int[np.ndarray, " positions"]
) -> UInt8[np.ndarray, " positions"]:
    """Find the first fault at or after each position."""
    faulty = np.flatnonzero(source.faults)
    if not len(faulty):
        return np.zeros(len(at), dtype=np.uint8)
    return source.faults[faulty[np.minimum(np.searchsorted(faulty, at), len(faulty) - 1)]]


def _count_faults(side: str, faults: UInt8[np.ndarray, " positions"]) -> Counter[str]:
    counts = np.bincount(faults, minlength=len(Fault))
    return Counter({f"{side}: {fault.reason}": int(counts[fault]) for fault in Fault if fault})
