"""Distributions at target positions that start inside a source token.

A target position may start at byte b, inside the source token that starts at byte a, where a token
of the target starts as well. What the source recorded at a, before any of these bytes, and the
bytes from a to b give a distribution of the target's next token at b. Each source token of the
record is one of these:

- It does not begin with the text from a to b: ruled out.
- It does, but the target's own tokenization of it has no token that starts at b: ruled out by the
  target's tokens so far, which end at b.
- It does not end at b, and the target's tokenization of it has a token there: the mass is that
  token's.
- It ends at b, or its tokenization is not known (`inside_map.py`): it remains, but what comes at b
  is unknown. The mass is the tail's.

Divided by the mass of all that is not ruled out, this is the source's distribution given the text.
Tokens outside the record count as well: each is at most as likely as the least likely one of the
top k, so their number that is not ruled out, times its probability, is an upper bound of their
mass; so is the mass outside the record. The smaller of the two joins the tail.

**The result does not depend on the text after b.** The distribution is a function of the source's
record at a, of the bytes from a to b, and of the two vocabularies: the record holds the natural top
k, whatever comes next, and the true next token's probability, which is stored apart, is not used;
nor are random draws, but the head that was recorded beside them. The true source token is looked up
for its bytes before b alone, which are the text's. Therefore the target's true token gets no chain
probability either, as at positions where both start: that product contains the probability of the
source token that really came. What follows b decides only whether a position is inside a source
token at all, as it decides for all others that it is not.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from rayfuse.align.distributions import merge_entries
from rayfuse.align.inside_map import RULED_OUT, UNKNOWN, InsideMap
from rayfuse.align.records import SLICE_POSITIONS
from rayfuse.align.token_spans import Fault, PlacedTokens, TokenBytes
from rayfuse.storage.codec import EncodedTopK, TopK, decode_probs

MIN_KNOWN_SHARE = 0.5
"""Of the mass that is not ruled out at an accepted position, the least share with a known token.
Below a half, the tail outweighs what is known, and part of the tail is a bound, no measurement."""


@dataclass(frozen=True)
class InsidePositions:
    """Target positions inside source tokens, with the source positions at the tokens' starts."""

    target_at: Int[np.ndarray, " positions"]
    source_at: Int[np.ndarray, " positions"]
    num_bytes: Int[np.ndarray, " positions"]
    """Bytes of the text between the two, at least 1."""

    def split(self, size: int) -> Iterator["InsidePositions"]:
        """Yield consecutive parts of at most so many positions."""
        for start in range(0, len(self.target_at), size):
            part = slice(start, start + size)
            yield InsidePositions(self.target_at[part], self.source_at[part], self.num_bytes[part])


def find_inside_positions(source: PlacedTokens, target: PlacedTokens) -> InsidePositions:
    """Find the target positions that start inside a source token, and may have a distribution.

    The source token has a position before it that predicts it, starts where a target token does,
    and spells the text. The first tokens of a text that have a prefix space are omitted: there the
    two sides may not begin with the same bytes.
    """
    at = np.flatnonzero(target.can_match & ~target.next_is_eos & ~target.next_has_prefix_space)
    if not len(at) or not len(source.ids):
        return InsidePositions(*np.zeros((3, 0), dtype=np.int64))
    byte = target.ends[at]
    row = np.searchsorted(target.offsets, at, side="right") - 1
    # The first source token that does not end before the byte; the position before predicts it.
    covering = np.searchsorted(source.ends, byte)
    is_inside = (covering > source.offsets[row]) & (covering < source.offsets[row + 1])
    at, byte, covering = at[is_inside], byte[is_inside], covering[is_inside]
    source_at = covering - 1
    begins = source.ends[source_at]
    is_sound = source.can_match & ~source.next_has_prefix_space & ~source.next_is_eos
    starts_token = np.zeros(int(max(source.ends[-1], target.ends[-1])) + 1, dtype=bool)
    starts_token[target.ends[target.can_match & ~target.next_has_prefix_space]] = True
    kept = (begins < byte) & (byte < source.ends[covering])
    kept &= is_sound[source_at] & starts_token[begins] & ~_has_fault_since(begins, at, target)
    return InsidePositions(at[kept], source_at[kept], (byte - begins)[kept])


def _has_fault_since(
    begins: Int[np.ndarray, " positions"], at: Int[np.ndarray, " positions"], target: PlacedTokens
) -> Bool[np.ndarray, " positions"]:
    """Find the positions before which, from a byte on, a target token does not spell the text."""
    faults_before = np.concatenate([[0], np.cumsum(target.faults != Fault.NONE)])
    return faults_before[at] > faults_before[np.searchsorted(target.ends, begins)]


def map_inside_tokens(
    positions: InsidePositions,
    source_ids: Int[np.ndarray, " source_tokens"],
    head: EncodedTopK,
    vocabulary: TokenBytes,
    inside: InsideMap,
    *,
    num_entries: int,
) -> Iterator[tuple[InsidePositions, TopK]]:
    """Yield the positions where enough is known, and their distributions, likeliest first.

    Args:
        positions: Those that `find_inside_positions` has found.
        source_ids: The source's tokens.
        head: The source's natural top k at each of them, without draws.
        vocabulary: The source's.
        inside: The map from the source's vocabulary to the target's.
        num_entries: Of each distribution of the result; at least k.
    """
    for part in positions.split(SLICE_POSITIONS):
        top = _map_slice(part, source_ids, head, vocabulary, inside)
        known = top.probs.sum(axis=1)
        is_kept = (known > 0) & (known >= MIN_KNOWN_SHARE * (known + top.tail))
        kept = InsidePositions(
            part.target_at[is_kept], part.source_at[is_kept], part.num_bytes[is_kept]
        )
        total = (known + top.tail)[is_kept]
        room = ((0, num_entries + 1 - top.ids.shape[1]), (0, 0))  # merging drops the last one
        scaled = TopK(
            np.pad(top.ids[is_kept].T, room, constant_values=-1).T,
            np.pad((top.probs[is_kept] / total[:, None]).T, room).T,
            top.tail[is_kept] / total,
        )
        yield kept, merge_entries(scaled, np.full(len(total), -1, dtype=np.int32))


def _map_slice(
    positions: InsidePositions,
    source_ids: Int[np.ndarray, " source_tokens"],
    head: EncodedTopK,
    vocabulary: TokenBytes,
    inside: InsideMap,
) -> TopK:
    """Compute the masses of known tokens, and of the tail; what is ruled out has none."""
    source_at, num_bytes = positions.source_at, positions.num_bytes
    ids, tails = head.ids[source_at], head.tail_logprobs[source_at]
    probs = decode_probs(head.codes[source_at].reshape(-1), ids, tails).T
    ids = ids.T.copy()  # in memory entries first, as in `distributions`
    # The true token's bytes before b are the text's own; nothing else of it is used.
    begun = inside.prefix_ids[vocabulary.starts[source_ids[source_at + 1]] + num_bytes - 1]
    lengths, cuts = vocabulary.lengths[ids], vocabulary.starts[ids] + num_bytes
    begins_alike = (ids >= 0) & (lengths >= num_bytes)
    begins_alike &= inside.prefix_ids[np.where(begins_alike, cuts, 1) - 1] == begun
    is_longer = begins_alike & (lengths > num_bytes)
    goals = np.where(is_longer, inside.goals[np.where(is_longer, cuts, 0)], np.int32(UNKNOWN))
    is_possible = begins_alike & (goals != RULED_OUT)
    is_known = goals >= 0
    num_others = inside.num_possible[begun] - is_possible.sum(axis=0)
    least = np.where(ids >= 0, probs, np.float32(1)).min(axis=0)
    others = np.minimum(np.exp(tails.astype(np.float32)), num_others * least)
    masses = probs * is_known
    tail = (probs * is_possible).sum(axis=0) - masses.sum(axis=0) + others
    return TopK(
        np.where(is_known, goals, np.int32(-1)).T,
        masses.T,
        np.maximum(tail, 0).astype(np.float32),
    )
