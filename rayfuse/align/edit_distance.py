"""The papers' minimum edit distance alignment: dynamic time warping over two token strings.

FuseLLM, arXiv 2401.10491, section 3.2: each cell of the path costs the Levenshtein distance of its
two tokens; here over the bytes that tokens spell, so that no tokenizer's own alphabet gets in.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import no_type_check

import numba
import numpy as np
from jaxtyping import Int
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from rayfuse.align.matches import Matches
from rayfuse.align.token_spans import PlacedTokens, TokenBytes
from rayfuse.align.vocab_map import PLAIN, VocabMaps

FAR = 2**60
"""More than any path costs."""

BOTH, BY_SOURCE, BY_TARGET = 0, 1, 2
"""How a path steps to a pair of tokens: on in both strings, or in one alone."""

NOT_NEAREST = "no single token that is equal or nearest"


def match_by_edit_distance(
    source: PlacedTokens,
    target: PlacedTokens,
    vocabularies: tuple[TokenBytes, TokenBytes],
    maps: VocabMaps,
) -> Matches:
    """Return the target positions whose next token is warped to one source token that means it.

    It means it if both spell the same bytes or the vocabulary map leads from one to the other. EOS
    is warped to EOS. The matched source token's probability is the target token's.

    Args:
        source: The source's tokens of a shard.
        target: The target's.
        vocabularies: The source's and the target's.
        maps: Of the source vocabulary, to the nearest target tokens.
    """
    ours = _split_rows(source, vocabularies[0])
    theirs = _split_rows(target, vocabularies[1])
    found = [_match_row(*rows, maps[PLAIN]) for rows in zip(ours, theirs, strict=True)]
    source_at, target_at = np.concatenate([np.zeros((2, 0), dtype=np.int64), *found], axis=1)
    is_sound = source.can_match[source_at] & target.can_match[target_at]
    num_far = int(target.has_next.sum()) - len(target_at)
    matches = Matches(target_at, source_at, source_at + 1, {NOT_NEAREST: num_far})
    return matches.select(is_sound, "text changed by a tokenizer")


class _TextTokens:
    """One row's tokens of text: where they are, and which distinct ones there are."""

    def __init__(self, placed: PlacedTokens, start: int, stop: int, vocabulary: TokenBytes) -> None:
        ids = placed.ids[start:stop]
        self.at = start + np.flatnonzero(vocabulary.lengths[ids] > 0)
        self.ids = placed.ids[self.at]
        self.distinct_ids, self.kinds = np.unique(self.ids, return_inverse=True)
        self.spelled = [vocabulary.spell(token_id) for token_id in self.distinct_ids.tolist()]
        self.first = start
        self.before_eos = start + np.flatnonzero(placed.next_is_eos[start:stop])


def _split_rows(placed: PlacedTokens, vocabulary: TokenBytes) -> Iterator[_TextTokens]:
    for start, stop in pairwise(placed.offsets.tolist()):
        yield _TextTokens(placed, start, stop, vocabulary)


def _match_row(
    source: _TextTokens, target: _TextTokens, vocab_map: Int[np.ndarray, " source_vocab_plus_1"]
) -> Int[np.ndarray, "2 matches"]:
    """Return source and target positions of one row that are matched."""
    eos = min(len(source.before_eos), len(target.before_eos))
    ends = np.stack([source.before_eos[:eos], target.before_eos[:eos]])
    if not len(source.at) or not len(target.at):
        return ends
    distances = cdist(source.spelled, target.spelled, scorer=Levenshtein.distance, dtype=np.int32)
    source_step, target_step = warp_tokens(distances, source.kinds, target.kinds)
    times = np.bincount(target_step, minlength=len(target.at))
    source_of = np.zeros(len(target.at), dtype=np.int64)
    source_of[target_step] = source_step
    is_equal = distances[source.kinds[source_of], target.kinds] == 0
    is_nearest = vocab_map[source.ids[source_of]] == target.ids
    has_before = (source.at[source_of] > source.first) & (target.at > target.first)
    accepted = (times == 1) & (is_equal | is_nearest) & has_before
    pairs = np.stack([source.at[source_of[accepted]] - 1, target.at[accepted] - 1])
    return np.concatenate([pairs, ends], axis=1)


def warp_tokens(
    distances: Int[np.ndarray, "source_kinds target_kinds"],
    source: Int[np.ndarray, " num_source"],
    target: Int[np.ndarray, " num_target"],
) -> Int[np.ndarray, "2 path"]:
    """Return the cheapest path from the first pair of tokens to the last, as indices of both.

    A step goes on in both strings, in the source or in the target; every cell on the path pays.
    Of equal ways the one that came by both is taken, then the one by the source.

    Args:
        distances: Between the distinct tokens of both sides.
        source: Which of them each source token is.
        target: Which of them each target token is.
    """
    return _trace_back(_find_ways(distances, source, target))


@numba.njit(cache=True)
@no_type_check
def _find_ways(distances, source, target):
    """Return for each cell how the cheapest path comes to it: BOTH, BY_SOURCE or BY_TARGET."""
    num_target = len(target)
    ways = np.empty((len(source), num_target), dtype=np.uint8)
    above = np.full(num_target + 1, FAR, dtype=np.int64)
    above[0] = 0  # the start, before the first pair
    totals = np.empty_like(above)
    for i in range(len(source)):
        totals[0] = FAR
        for j in range(num_target):
            best, way = above[j], BOTH
            if above[j + 1] < best:
                best, way = above[j + 1], BY_SOURCE
            if totals[j] < best:
                best, way = totals[j], BY_TARGET
            totals[j + 1] = best + distances[source[i], target[j]]
            ways[i, j] = way
        above, totals = totals, above
    return ways


@numba.njit(cache=True)
@no_type_check
def _trace_back(ways):
    """Return the path that ends in the last cell."""
    i, j = ways.shape[0] - 1, ways.shape[1] - 1
    path = np.empty((2, i + j + 2), dtype=np.int64)
    at = path.shape[1]
    while i >= 0 and j >= 0:
        at -= 1
        path[0, at], path[1, at] = i, j
        way = ways[i, j]
        if way != BY_TARGET:
            i -= 1
        if way != BY_SOURCE:
            j -= 1
    return path[:, at:]
