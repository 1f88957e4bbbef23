"""`min_edit_distance`: the papers' minimum edit distance alignment, dynamic time warping of tokens.

FuseLLM, arXiv 2401.10491, section 3.2: each cell of the path costs the Levenshtein distance of its
two tokens; here over the tokens' bytes, so that no tokenizer's own alphabet changes a distance.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import no_type_check

import numba
import numpy as np
from jaxtyping import Int
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from rayfuse.align.matches import Matches
from rayfuse.align.method import Alignment, IdMap, MapInputs, Method, StoredMap
from rayfuse.align.token_spans import PlacedTokens, TokenBytes
from rayfuse.align.vocab_map import UNCHANGED, list_same_names
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.models.tokenizer import TextTokenizer

FAR = 2**60
"""Above the cost of any path."""

BOTH, BY_SOURCE, BY_TARGET = 0, 1, 2
"""How a path steps to a pair of tokens: forward in both strings, or in one alone."""

NOT_NEAREST = "no single token that is equal or nearest"

NEAREST_CHUNK = 256
"""Source tokens compared with all target tokens at a time: 64 MB for 64,000 tokens."""

TASK_TOKENS = 2048
"""Source tokens that one task maps: about a second of one core."""


def match_by_edit_distance(
    source: PlacedTokens, target: PlacedTokens, alignment: Alignment
) -> Matches:
    """Match each target position where the next token is warped to one source token that means it.

    Two tokens mean the same if their bytes are equal or the vocabulary map leads from one to the
    other. EOS is warped to EOS. The probability of the matched source token is the target token's.

    Args:
        source: The source's tokens of a shard.
        target: The target's.
        alignment: Of the two; its map leads to the nearest target tokens.
    """
    source_rows = _split_rows(source, alignment.source)
    target_rows = _split_rows(target, alignment.target)
    pairs = zip(source_rows, target_rows, strict=True)
    found = [_match_row(*rows, alignment.maps[UNCHANGED]) for rows in pairs]
    source_at, target_at = np.concatenate([np.zeros((2, 0), dtype=np.int64), *found], axis=1)
    is_sound = source.can_match[source_at] & target.can_match[target_at]
    num_far = int(target.has_next.sum()) - len(target_at)
    matches = Matches(target_at, source_at, source_at + 1, {NOT_NEAREST: num_far})
    return matches.select(is_sound, "text changed by a tokenizer")


class _TextTokens:
    """One row's tokens of text: their positions, and the distinct tokens among them."""

    def __init__(self, placed: PlacedTokens, start: int, stop: int, vocabulary: TokenBytes) -> None:
        ids = placed.ids[start:stop]
        self.at = start + np.flatnonzero(vocabulary.lengths[ids] > 0)
        self.ids = placed.ids[self.at]
        distinct_ids, self.kinds = np.unique(self.ids, return_inverse=True)
        self.token_bytes = [vocabulary.spell(token_id) for token_id in distinct_ids.tolist()]
        self.first = start
        self.before_eos = start + np.flatnonzero(placed.next_is_eos[start:stop])


def _split_rows(placed: PlacedTokens, vocabulary: TokenBytes) -> Iterator[_TextTokens]:
    for start, stop in pairwise(placed.offsets.tolist()):
        yield _TextTokens(placed, start, stop, vocabulary)


def _match_row(
    source: _TextTokens, target: _TextTokens, vocab_map: Int[np.ndarray, " source_vocab_plus_1"]
) -> Int[np.ndarray, "2 matches"]:
    """Match source and target positions of one row."""
    eos = min(len(source.before_eos), len(target.before_eos))
    ends = np.stack([source.before_eos[:eos], target.before_eos[:eos]])
    if not len(source.at) or not len(target.at):
        return ends
    distances = cdist(
        source.token_bytes, target.token_bytes, scorer=Levenshtein.distance, dtype=np.int32
    )
    source_step, target_step = warp_tokens(distances, source.kinds, target.kinds)
    times = np.bincount(target_step, minlength=len(target.at))
    source_of = np.zeros(len(target.at), dtype=np.int64)
    source_of[target_step] = source_step
    is_equal = distances[source.kinds[source_of], target.kinds] == 0
    is_nearest = vocab_map[source.ids[source_of]] == target.ids
    has_before = (source.at[source_of] > source.first) & (target.at > target.first)
    accepted = (times == 1) & (is_equal | is_nearest) & has_before
    # A token is predicted at the position before it.
    pairs = np.stack([source.at[source_of[accepted]] - 1, target.at[accepted] - 1])
    return np.concatenate([pairs, ends], axis=1)


def warp_tokens(
    distances: Int[np.ndarray, "source_kinds target_kinds"],
    source: Int[np.ndarray, " num_source"],
    target: Int[np.ndarray, " num_target"],
) -> Int[np.ndarray, "2 path"]:
    """Find the cheapest path from the first pair of tokens to the last, as indices of both.

    A step moves forward in both strings, in the source or in the target; the path costs the sum of
    its cells. Of paths of equal cost, a step in both comes first, then one in the source.

    Args:
        distances: Between the distinct tokens of both sides.
        source: The row of `distances` of each source token.
        target: The column of `distances` of each target token.
    """
    return _trace_back(_find_steps(distances, source, target))


@numba.njit(cache=True)
@no_type_check
def _find_steps(distances, source, target):
    """Find how the cheapest path comes to each cell: BOTH, BY_SOURCE or BY_TARGET."""
    num_target = len(target)
    steps = np.empty((len(source), num_target), dtype=np.uint8)
    # Only the row above is needed for the costs, so memory is one byte a cell, not eight.
    above = np.full(num_target + 1, FAR, dtype=np.int64)
    above[0] = 0  # the start, before the first pair
    totals = np.empty_like(above)
    for i in range(len(source)):
        totals[0] = FAR
        for j in range(num_target):
            best, step = above[j], BOTH
            if above[j + 1] < best:
                best, step = above[j + 1], BY_SOURCE
            if totals[j] < best:
                best, step = totals[j], BY_TARGET
            totals[j + 1] = best + distances[source[i], target[j]]
            steps[i, j] = step
        above, totals = totals, above
    return steps


@numba.njit(cache=True)
@no_type_check
def _trace_back(steps):
    """Follow the steps back from the last cell, and list the path forward."""
    i, j = steps.shape[0] - 1, steps.shape[1] - 1
    path = np.empty((2, i + j + 2), dtype=np.int64)
    at = path.shape[1]
    while i >= 0 and j >= 0:
        at -= 1
        path[0, at], path[1, at] = i, j
        step = steps[i, j]
        if step != BY_TARGET:
            i -= 1
        if step != BY_SOURCE:
            j -= 1
    return path[:, at:]


def map_to_nearest(token_ids: Sequence[int], source: TextTokenizer, target: TextTokenizer) -> IdMap:
    """Map source tokens to the target tokens at the least edit distance.

    The distance is Levenshtein's, over the tokens' bytes; ties go to the lowest id, but never to a
    byte token if another token has its byte (FuseLLM, arXiv 2401.10491, section 3.2). Tokens
    without bytes are mapped to -1.
    """
    by_bytes = target.list_by_bytes()
    goals = sorted(by_bytes, key=by_bytes.__getitem__)  # by id: the first of equals is the lowest
    goal_ids = np.array([by_bytes[goal] for goal in goals], dtype=np.int32)
    token_bytes = [source.token_bytes[token_id] or b"" for token_id in token_ids]
    same_names = dict(list_same_names(source, target))
    mapped = np.array(
        [
            same_names.get(token_id, by_bytes.get(piece, -1))
            for token_id, piece in zip(token_ids, token_bytes, strict=True)
        ],
        dtype=np.int32,
    )
    unmapped = [i for i in np.flatnonzero(mapped < 0).tolist() if token_bytes[i]]
    for start in range(0, len(unmapped), NEAREST_CHUNK):
        part = unmapped[start : start + NEAREST_CHUNK]
        distances = cdist(
            [token_bytes[i] for i in part], goals, scorer=Levenshtein.distance, dtype=np.int32
        )
        mapped[part] = goal_ids[distances.argmin(axis=1)]
    return mapped


MapParts = dict[int, Int[np.ndarray, " _"]]
"""Parts of a map by their first source token; the parts' lengths differ."""


def _list_parts(inputs: MapInputs) -> list[range]:
    vocab_size = load_recipe_tokenizer(inputs.source).vocab_size
    starts = range(0, vocab_size, TASK_TOKENS)
    return [range(start, min(start + TASK_TOKENS, vocab_size)) for start in starts]


def _map_part(inputs: MapInputs, token_ids: range) -> MapParts:
    """Map some of the vocabulary; the result is keyed by the first token."""
    source, target = load_recipe_tokenizer(inputs.source), load_recipe_tokenizer(inputs.target)
    return {token_ids.start: map_to_nearest(token_ids, source, target)}


def _merge_parts(parts: Sequence[MapParts]) -> MapParts:
    return {start: mapped for part in parts for start, mapped in part.items()}


def _join_parts(inputs: MapInputs, parts: MapParts) -> IdMap:
    del inputs
    return np.concatenate([parts[start] for start in sorted(parts)])


METHOD = Method(
    match=match_by_edit_distance,
    stored_map=StoredMap(_list_parts, _map_part, _merge_parts, _join_parts, unit="chunks"),
    map_matched=map_to_nearest,
    # The papers' rule gives mass to no token but those that the map leads to.
    keeps_true_token=False,
)
