"""`min_edit_distance` against a slow implementation of the papers' rule, cell by cell and token by
token."""

import gzip
import json
from typing import no_type_check

import numba
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from benchmarks.synthetic import make_captured, make_corpus
from rayfuse.align.method import MapInputs, build_alignment
from rayfuse.align.methods.min_edit_distance import (
    METHOD,
    map_to_nearest,
    match_by_edit_distance,
    warp_tokens,
)
from rayfuse.align.token_spans import list_token_bytes, place_tokens
from rayfuse.align.vocab_map import UNCHANGED, build_maps
from rayfuse.config.models import ModelSettings
from rayfuse.models.text_tokenizer import TextTokenizer, build_tokenizer
from rayfuse.models.tokenizer import load_tokenizer
from rayfuse.storage.codec import flatten_column
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.store import LocalStore


def levenshtein(left: bytes, right: bytes) -> int:
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        above, row = row, [i]
        for j, b in enumerate(right, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def warp_slowly(left: list[bytes], right: list[bytes]) -> list[tuple[int, int]]:
    """Dynamic time warping, every cell on the path paying; ties: both, then left, then right."""
    distances: dict[tuple[bytes, bytes], int] = {}
    total: dict[tuple[int, int], float] = {}
    came_from: dict[tuple[int, int], tuple[int, int]] = {}
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            if (a, b) not in distances:
                distances[a, b] = levenshtein(a, b)
            ways = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
            open_ways = [way for way in ways if way in total]
            best = min(open_ways, key=total.__getitem__, default=None)  # the first of equals
            total[i, j] = distances[a, b] + (total[best] if best else 0)
            if best:
                came_from[i, j] = best
    path = [(len(left) - 1, len(right) - 1)]
    while path[-1] in came_from:
        path.append(came_from[path[-1]])
    return path[::-1]


def text_tokens(tokenizer: TextTokenizer, ids: np.ndarray) -> list[tuple[int, int, bytes]]:
    """List a row's tokens of text: where, which, and what they spell."""
    spelled = ((at, int(i), tokenizer.token_bytes[i]) for at, i in enumerate(ids))
    return [(at, i, piece) for at, i, piece in spelled if piece]


def match_slowly(source, target, source_ids, target_ids, nearest) -> set[tuple[int, int]]:
    ours, theirs = text_tokens(source, source_ids), text_tokens(target, target_ids)
    path = warp_slowly([piece for *_, piece in ours], [piece for *_, piece in theirs])
    found = set()
    for j, (at, token_id, piece) in enumerate(theirs):
        partners = [i for i, other in path if other == j]
        if len(partners) == 1:
            source_at, source_id, source_piece = ours[partners[0]]
            if source_piece == piece or nearest[source_id] == token_id:
                found.add((at - 1, source_at - 1))
    if source_ids[-1] == source.eos_id and target_ids[-1] == target.eos_id:
        found.add((len(target_ids) - 2, len(source_ids) - 2))
    return found


@pytest.fixture(scope="module")
def pair(shared_data) -> tuple[TextTokenizer, TextTokenizer]:
    folder = shared_data / "tokenizers"
    return load_tokenizer(str(folder / "gpt-neox-20b")), load_tokenizer(str(folder / "phi-3-mini"))


@pytest.fixture(scope="module")
def nearest(pair) -> np.ndarray:
    return map_to_nearest(range(pair[0].vocab_size), *pair)


def read_rows(shared_data, count: int) -> list[str]:
    rows: list[str] = []
    for domain in ("wiki", "code", "multilingual", "math", "books"):
        path = shared_data / f"corpus/{domain}/valid.jsonl.gz"
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in file]
        pieces = [text[start : start + 220] for text in texts for start in range(0, 880, 220)]
        rows += [piece for piece in pieces if piece][: count // 5]
    return rows


def test_matches_are_those_of_the_slow_rule_on_200_real_rows(pair, nearest, shared_data):
    source, target = pair
    texts = read_rows(shared_data, 200)
    assert len(texts) == 200
    corpus = make_corpus(texts, target, max_tokens=2048)
    captured = make_captured(corpus, source, top_k=1)
    encoded = [text.encode() for text in corpus["text"].to_pylist()]
    target_ids, target_offsets = flatten_column(corpus, "target_ids")
    source_ids, source_offsets = flatten_column(captured, "token_ids")
    ends = corpus["ends_document"].to_pylist()
    maps = build_maps(nearest, source, target)
    alignment = build_alignment(source, target, "min_edit_distance", maps)
    ours = place_tokens(source_ids, source_offsets, encoded, alignment.source, ends)
    theirs = place_tokens(target_ids, target_offsets, encoded, alignment.target, ends)
    matches = match_by_edit_distance(ours, theirs, alignment)
    found = set(zip(matches.target_at.tolist(), matches.source_at.tolist(), strict=True))
    assert len(found) == len(matches.target_at)
    expected: set[tuple[int, int]] = set()
    for row in range(len(encoded)):
        start, other = target_offsets[row], source_offsets[row]
        pairs = match_slowly(
            source,
            target,
            source_ids[other : source_offsets[row + 1]],
            target_ids[start : target_offsets[row + 1]],
            nearest,
        )
        changed = (ours.faults[other : source_offsets[row + 1]] > 0).nonzero()[0]
        expected |= {(int(start) + t, int(other) + s) for t, s in pairs if s not in changed}
    assert found == expected
    assert sum(matches.unmatched.values()) + len(found) == theirs.has_next.sum()


@numba.njit(cache=True)
@no_type_check
def find_nearest_slowly(piece, goals, lengths):
    """Levenshtein's table, cell by cell, to one goal after the other; the first of equals wins."""
    nearest, least = -1, 2**31
    row = np.empty(goals.shape[1] + 1, dtype=np.int64)
    for goal in range(len(goals)):
        length = lengths[goal]
        if abs(length - len(piece)) >= least:
            continue
        for j in range(length + 1):
            row[j] = j
        for i in range(len(piece)):
            diagonal, row[0] = row[0], i + 1
            for j in range(length):
                change = diagonal + (piece[i] != goals[goal, j])
                diagonal = row[j + 1]
                row[j + 1] = min(row[j] + 1, row[j + 1] + 1, change)
        if row[length] < least:
            nearest, least = goal, row[length]
    return nearest


def test_every_map_entry_of_200_real_rows_is_the_nearest_token_the_lowest_id_of_equals(
    pair, nearest, shared_data
):
    source, target = pair
    rows = source.encode_rows(read_rows(shared_data, 200), [True] * 200)
    used = [i for i in np.unique(np.concatenate(rows)).tolist() if source.token_bytes[i]]
    assert len(used) > 3000
    # A byte token stands for its byte only where no other entry spells it: no text has it else.
    entries = [(i, piece) for i, piece in enumerate(target.token_bytes) if piece]
    others = {piece for i, piece in entries if not target.token_names[i].startswith("<0x")}
    goals = [
        (i, piece)
        for i, piece in entries
        if not target.token_names[i].startswith("<0x") or piece not in others
    ]
    lengths = np.array([len(piece) for _, piece in goals])
    table = np.zeros((len(goals), lengths.max()), dtype=np.uint8)
    for number, (_, piece) in enumerate(goals):
        table[number, : len(piece)] = list(piece)
    by_name = {name: i for i, name in enumerate(target.token_names)}
    for token_id in used:
        piece = source.token_bytes[token_id] or b""
        found = find_nearest_slowly(np.frombuffer(piece, dtype=np.uint8), table, lengths)
        namesake = by_name.get(source.token_names[token_id])
        if namesake is not None and target.token_bytes[namesake] == piece:
            assert nearest[token_id] == namesake
        else:
            assert nearest[token_id] == goals[found][0], piece


def list_of_words(*words: str) -> TextTokenizer:
    vocabulary = {word: token_id for token_id, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    return build_tokenizer(tokenizer.to_str(), start_id=None, eos_id=None)


def test_tokens_of_hundreds_of_bytes_are_as_far_away_as_they_are_long():
    source = list_of_words("[UNK]", "abc", "xyz" * 100, "#" * 290)
    target = list_of_words("[UNK]", "-" * 256, "zyx" * 100, "abd", "#" * 300, "-" * 512)
    goals = [(i, piece) for i, piece in enumerate(target.token_bytes) if piece]
    nearest = map_to_nearest(range(1, 4), source, target)
    for token_id, goal in zip(range(1, 4), nearest.tolist(), strict=True):
        piece = source.token_bytes[token_id] or b""
        assert goal == min(goals, key=lambda each, own=piece: levenshtein(own, each[1]))[0]
    assert nearest.tolist() == [3, 2, 4]


@pytest.mark.parametrize("side", [0, 1])
def test_a_tokenizer_warped_with_itself_is_the_identity(side, pair, shared_data):
    tokenizer = pair[side]
    corpus = make_corpus(read_rows(shared_data, 20), tokenizer, max_tokens=2048)
    encoded = [text.encode() for text in corpus["text"].to_pylist()]
    ids, offsets = flatten_column(corpus, "target_ids")
    vocabulary = list_token_bytes(tokenizer)
    placed = place_tokens(ids, offsets, encoded, vocabulary, corpus["ends_document"].to_pylist())
    own = map_to_nearest(range(tokenizer.vocab_size), tokenizer, tokenizer)
    spelled = [i for i, piece in enumerate(tokenizer.token_bytes) if piece]
    np.testing.assert_array_equal(own[spelled], spelled)
    maps = build_maps(own, tokenizer, tokenizer)
    alignment = build_alignment(tokenizer, tokenizer, "min_edit_distance", maps)
    matches = match_by_edit_distance(placed, placed, alignment)
    assert set(matches.target_at.tolist()) == set(np.flatnonzero(placed.can_match).tolist())
    np.testing.assert_array_equal(matches.source_at, matches.target_at)


def test_newline_and_end_of_text_are_not_mapped_to_words(pair, nearest):
    source, target = pair
    maps = build_maps(nearest, source, target)
    newline = source.list_by_bytes()[b"\n"]
    assert target.token_bytes[maps[UNCHANGED, newline]] == b"\n"
    assert maps[UNCHANGED, source.eos_id] == target.eos_id


@pytest.mark.parametrize("seed", range(20))
def test_warping_is_the_slow_ones_path_even_among_many_ties(seed):
    random = np.random.default_rng(seed)
    words = [b"a", b"b", b"ab", b"ba", b"abb"]
    left = [words[i] for i in random.integers(0, 5, random.integers(1, 15))]
    right = [words[i] for i in random.integers(0, 5, random.integers(1, 15))]
    kinds = [sorted(set(side)) for side in (left, right)]
    distances = np.array([[levenshtein(a, b) for b in kinds[1]] for a in kinds[0]], dtype=np.int32)
    source = np.array([kinds[0].index(token) for token in left])
    target = np.array([kinds[1].index(token) for token in right])
    path = warp_tokens(distances, source, target)
    assert [tuple(cell) for cell in path.T.tolist()] == warp_slowly(left, right)


def test_parts_of_different_lengths_join_to_one_map_in_the_order_of_the_vocabulary(tmp_path):
    parts = {5: np.array([7, 8, 9], np.int32), 0: np.array([1, 2, 3, 4, 5], np.int32)}
    stored_map = METHOD.stored_map
    assert stored_map is not None
    merged = stored_map.merge([{start: part} for start, part in parts.items()])
    model = ModelSettings(model="not read")
    corpus = DataSet(LocalStore(str(tmp_path)), "corpus", "", "not-read")
    inputs = MapInputs(model, model, corpus)
    np.testing.assert_array_equal(stored_map.finish(inputs, merged), [1, 2, 3, 4, 5, 7, 8, 9])
