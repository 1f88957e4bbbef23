"""Positions inside source tokens: an oracle by definition, and what must never decide a result."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.synthetic import make_captured, make_corpus
from rayfuse.align.inside_map import build_inside_map, number_prefixes
from rayfuse.align.inside_tokens import (
    MIN_KNOWN_SHARE,
    InsidePositions,
    find_inside_positions,
    map_inside_tokens,
)
from rayfuse.align.method import build_alignment
from rayfuse.align.records import read_records
from rayfuse.align.shard import align_shard
from rayfuse.align.token_spans import list_token_bytes, place_tokens
from rayfuse.capture.rows import build_captured, tokenize_rows
from rayfuse.capture.top_k import TopLogprobs
from rayfuse.models.text_tokenizer import TextTokenizer, build_tokenizer
from rayfuse.schema import ALIGNED
from rayfuse.storage.codec import decode_probs, flatten_column
from tests.align.inside_oracle import expect_row, goal_of, place_plainly
from tests.fakes import SAMPLE, byte_level_tokenizer, sentencepiece_tokenizer

TOP_K = 12
CODE = (
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n\n"
    "    return total / len(values)\n\n\nclass Mean:\n    def __init__(self):\n        pass\n"
)
TEXTS = [*SAMPLE, CODE, "unbelievable, under, until;  unable 漢字 naïve", " x", "    y"]


def make_pair(kind: str, seed: int) -> tuple[TextTokenizer, TextTokenizer]:
    """Train a coarse source and a fine target, on other halves of the text."""
    random = np.random.default_rng(seed)
    texts = [TEXTS[i] for i in random.permutation(len(TEXTS))]
    half = len(texts) // 2
    # With more merges, lines become single tokens of a tokenizer that splits no words.
    source_size = (
        random.integers(620, 760) if kind.startswith("bytes") else random.integers(430, 500)
    )
    sizes = [int(source_size), int(random.integers(310, 380))]
    makers: dict[str, tuple[Callable, Callable]] = {
        "bytes to bytes": (byte_level_tokenizer, byte_level_tokenizer),
        "bytes to pieces": (byte_level_tokenizer, sentencepiece_tokenizer),
        "pieces to bytes": (sentencepiece_tokenizer, byte_level_tokenizer),
        "pieces to pieces": (sentencepiece_tokenizer, sentencepiece_tokenizer),
    }
    source, target = (
        build_tokenizer(
            make(size, part).to_str(),
            start_id=0 if make is byte_level_tokenizer else 1,
            eos_id=0 if make is byte_level_tokenizer else 2,
        )
        for make, size, part in zip(makers[kind], sizes, (texts, texts[:half]), strict=True)
    )
    return source, target


KINDS = ("bytes to bytes", "bytes to pieces", "pieces to bytes", "pieces to pieces")


def map_shard(
    corpus: pa.Table, captured: pa.Table, source: TextTokenizer, target: TextTokenizer
) -> tuple[InsidePositions, dict[int, tuple[dict[int, float], float]]]:
    """Compute distributions at positions inside tokens, before they are encoded."""
    texts = [text.encode() for text in corpus["text"].to_pylist()]
    ends = corpus["ends_document"].to_pylist()
    ours, theirs = list_token_bytes(source), list_token_bytes(target)
    places = place_tokens(*flatten_column(captured, "token_ids"), texts, ours, ends)
    others = place_tokens(*flatten_column(corpus, "target_ids"), texts, theirs, ends)
    found = find_inside_positions(places, others)
    result = {}
    for part, top in map_inside_tokens(
        found,
        places.ids,
        read_records(captured).head,
        ours,
        build_inside_map(source, target),
        num_entries=TOP_K,
    ):
        for at, ids, probs, tail in zip(part.target_at, top.ids, top.probs, top.tail, strict=True):
            pairs = zip(ids.tolist(), probs.tolist(), strict=True)
            result[int(at)] = {i: p for i, p in pairs if i >= 0}, float(tail)
    return found, result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_distributions_are_those_of_the_definition(kind, seed):
    source, target = make_pair(kind, seed)
    corpus = make_corpus(TEXTS, target, max_tokens=1000)
    captured = make_captured(corpus, source, top_k=TOP_K, seed=seed)
    found, result = map_shard(corpus, captured, source, target)
    flat_ids = flatten_column(captured, "top_ids")[0].reshape(-1, TOP_K)
    tails = flatten_column(captured, "tail_logprobs")[0]
    probs = decode_probs(flatten_column(captured, "top_logprobs")[0], flat_ids, tails)
    offsets = flatten_column(captured, "token_ids")[1]
    _, target_offsets = flatten_column(corpus, "target_ids")
    positions, expected = [], {}
    for number, text in enumerate(corpus["text"].to_pylist()):
        part = slice(offsets[number], offsets[number + 1])
        row = {
            "text": text,
            "source_ids": captured["token_ids"][number].as_py(),
            "target_ids": corpus["target_ids"][number].as_py(),
            "top_ids": flat_ids[part].tolist(),
            "top_probs": probs[part].tolist(),
            "tail": np.exp(tails[part].astype(np.float32)).tolist(),
        }
        for at, (masses, tail) in expect_row(row, source, target).items():
            positions.append(at + target_offsets[number])
            total, known = sum(masses.values()) + tail, sum(masses.values())
            assert abs(known - MIN_KNOWN_SHARE * total) > 1e-6 or known == 0, "choose another seed"
            if known > 0 and known >= MIN_KNOWN_SHARE * total:
                scaled = {token: mass / total for token, mass in masses.items()}
                expected[positions[-1]] = scaled, tail / total
    assert sorted(positions) == found.target_at.tolist()
    assert sorted(expected) == sorted(result)
    assert len(expected) > 20
    for at, (masses, tail) in expected.items():
        assert result[at][0] == pytest.approx(masses, rel=1e-5)
        assert result[at][1] == pytest.approx(tail, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_mass_is_conserved_and_nothing_else_changes(kind):
    source, target = make_pair(kind, 0)
    corpus = make_corpus(TEXTS, target, max_tokens=64)
    captured = make_captured(corpus, source, top_k=TOP_K)
    plain, plain_stats = align_shard(corpus, captured, build_alignment(source, target))
    table, stats = align_shard(
        corpus, captured, build_alignment(source, target, inside_tokens=True)
    )
    assert plain.schema == ALIGNED
    assert "inside_tokens" not in plain_stats
    is_inside, has_signal, had_signal = (
        flatten_column(of, name)[0]
        for of, name in ((table, "inside_token"), (table, "has_signal"), (plain, "has_signal"))
    )
    assert stats["inside_tokens"] == is_inside.sum() > 20
    assert stats["with_signal"] == has_signal.sum()
    np.testing.assert_array_equal(has_signal, had_signal | is_inside)
    assert not (had_signal & is_inside).any()
    counted = sum(count for name, count in stats.items() if name.startswith("unmatched: "))
    assert stats["with_signal"] + counted == stats["positions"]
    for name in ALIGNED.names:
        if name in ("top_ids", "top_logprobs", "tail_logprobs"):
            ours, theirs = (
                flatten_column(each, name)[0].reshape(len(is_inside), -1)[~is_inside]
                for each in (table, plain)
            )
            np.testing.assert_array_equal(ours, theirs)
        elif name != "has_signal":
            assert table[name] == plain[name]
    ids = flatten_column(table, "top_ids")[0].reshape(-1, TOP_K)
    tails = flatten_column(table, "tail_logprobs")[0]
    probs = decode_probs(flatten_column(table, "top_logprobs")[0], ids, tails)
    mass = probs.sum(axis=1) + np.exp(tails.astype(np.float32))
    np.testing.assert_allclose(mass[has_signal], 1.0, atol=1e-3)
    for row in ids[is_inside]:
        assert len(set(row[row >= 0])) == (row >= 0).sum() > 0


@pytest.mark.parametrize("maker", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_a_tokenizer_has_no_position_inside_its_own_tokens(maker):
    tokenizer = build_tokenizer(maker(500, TEXTS).to_str(), start_id=1, eos_id=2)
    corpus = make_corpus(TEXTS, tokenizer, max_tokens=64)
    captured = make_captured(corpus, tokenizer, top_k=TOP_K)
    plain, plain_stats = align_shard(corpus, captured, build_alignment(tokenizer, tokenizer))
    alignment = build_alignment(tokenizer, tokenizer, inside_tokens=True)
    table, stats = align_shard(corpus, captured, alignment)
    assert not flatten_column(table, "inside_token")[0].any()
    assert table.drop_columns(["inside_token"]) == plain
    assert stats == plain_stats | {"inside_tokens": 0.0}


def change_what_follows(
    corpus: pa.Table, byte: int, start: int, source: TextTokenizer, target: TextTokenizer
) -> pa.Table | None:
    """Replace the text from a byte on, inside the source token that starts at another byte.

    Returns:
        A corpus of one row with another source token there, whose tokens before are the same; None
        if the vocabulary has none.
    """
    text = corpus["text"][0].as_py().encode()
    (before,) = tokenize_rows(corpus, source)
    for token in source.token_bytes:
        if not token or not token.startswith(text[start:byte]) or len(token) <= byte - start:
            continue
        changed = text[:start] + token + b" and so on"
        if changed[: byte + 1] == text[: byte + 1]:
            continue
        try:
            other = make_corpus([changed.decode()], target, max_tokens=100_000)
        except UnicodeDecodeError:
            continue
        (after,) = tokenize_rows(other, source)
        ends = place_plainly(after.tolist(), source, changed)
        if start not in ends or ends[ends.index(start) + 1] <= byte:
            continue
        stop = ends.index(start) + 1
        target_ends = place_plainly(other["target_ids"][0].as_py(), target, changed)
        if (after[:stop] == before[:stop]).all() and byte in target_ends:
            return other
    return None


def capture(
    corpus: pa.Table, source: TextTokenizer, num_kept: int, likely: dict[int, bytes], seed: int
) -> tuple[pa.Table, np.ndarray]:
    """Capture natural records that are the same at the first positions, whatever comes next.

    Tokens that begin with a position's `likely` bytes are likely there.

    Returns:
        CAPTURED rows, and the distributions in full.
    """
    (ids,) = tokenize_rows(corpus, source)
    parts = []
    for number, size in ((0, num_kept), (seed, len(ids) - num_kept)):
        random = np.random.default_rng(number)
        logits = random.normal(0, 2, (size, source.vocab_size))
        parts.append(logits)
    logits = np.concatenate(parts)
    for at, begun in likely.items():
        logits[at] += 6 * np.array(
            [(token or b"").startswith(begun) for token in source.token_bytes]
        )
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    top_ids = np.argsort(-logprobs, axis=1)[:, :TOP_K].astype(np.int32)
    top = np.take_along_axis(logprobs, top_ids, axis=1)
    next_logprobs = np.append(logprobs[np.arange(len(ids) - 1), ids[1:]], 0.0)
    tails = np.log(1 - np.exp(top).sum(axis=1))
    record = TopLogprobs(top_ids, top, tails, next_logprobs, top_ids[:, :0])
    return build_captured(corpus, [ids], [record], source.eos_id)[0], np.exp(logprobs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_after_a_position_never_changes_its_distribution(kind):
    num_compared = num_equal_next = 0  # if the next token were always equal, it might decide
    for seed in range(4):
        source, target = make_pair(kind, seed)
        alignment = build_alignment(source, target, inside_tokens=True)
        corpus = make_corpus([CODE + TEXTS[-3]], target, max_tokens=100_000)
        text = corpus["text"][0].as_py().encode()
        (ids,) = tokenize_rows(corpus, source)
        ends = place_plainly(ids.tolist(), source, text)
        target_ends = place_plainly(corpus["target_ids"][0].as_py(), target, text)
        for at, byte in enumerate(target_ends[:-1]):
            covering = [i for i in range(2, len(ends)) if ends[i - 1] < byte < ends[i]]
            start = ends[covering[0] - 1] if covering else byte
            other = covering and change_what_follows(corpus, byte, start, source, target)
            if not other:
                continue
            changed_ends = place_plainly(
                other["target_ids"][0].as_py(), target, other["text"][0].as_py().encode()
            )
            changed_at = changed_ends.index(byte)
            found = []
            for each, where, number in ((corpus, at, 1), (other, changed_at, 2)):
                likely = {covering[0] - 1: text[start:byte]}
                captured, _ = capture(each, source, covering[0], likely, number)
                table, _ = align_shard(each, captured, alignment)
                flags = [table[name][0].as_py()[where] for name in ("has_signal", "inside_token")]
                top = slice(where * TOP_K, (where + 1) * TOP_K)
                columns = [table[name][0].as_py()[top] for name in ("top_ids", "top_logprobs")]
                tail = table["tail_logprobs"][0].as_py()[where]
                found.append((flags, columns, tail))
            assert found[0] == found[1]
            num_compared += found[0][0] == [True, True]
            next_ids = [
                each["target_ids"][0].as_py()[where + 1]
                for each, where in ((corpus, at), (other, changed_at))
            ]
            num_equal_next += next_ids[0] == next_ids[1]
            if num_compared > 5 and num_equal_next < num_compared:
                return
    raise AssertionError(f"{num_compared} positions were compared, too few")


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_gets_more_than_the_complete_distribution_gives_it(kind, monkeypatch):
    """The bound of what is outside the record holds: tokens of the record are not overrated."""
    source, target = make_pair(kind, 0)
    corpus = make_corpus([CODE], target, max_tokens=100_000)
    text = corpus["text"][0].as_py().encode()
    (ids,) = tokenize_rows(corpus, source)
    ends = place_plainly(ids.tolist(), source, text)
    likely = {at: text[end : end + 1] for at, end in enumerate(ends)}
    captured, probs = capture(corpus, source, len(ids), likely, 0)
    # Flat distributions: much is outside the record, so that few positions would be accepted.
    monkeypatch.setattr("rayfuse.align.inside_tokens.MIN_KNOWN_SHARE", 0.0)
    found, result = map_shard(corpus, captured, source, target)
    assert len(result) > 5
    for at, source_at, num_bytes in zip(*vars(found).values(), strict=True):
        if int(at) not in result:
            continue
        start = ends[source_at]
        begun = text[start : start + num_bytes]
        exact: dict[int | str, float] = {}
        for token_id, token in enumerate(source.token_bytes):
            if token and token.startswith(begun):
                goal = "unknown" if token == begun else goal_of(token, len(begun), source, target)
                exact[goal] = exact.get(goal, 0.0) + probs[source_at, token_id]
        total = sum(mass for goal, mass in exact.items() if goal != "ruled out")
        for token, prob in result[int(at)][0].items():
            assert prob <= exact[token] / total * 1.1  # the codec rounds probabilities by up to 5 %


def test_draws_are_not_used():
    source, target = make_pair("bytes to bytes", 0)
    corpus = make_corpus(TEXTS, target, max_tokens=100)
    captured = make_captured(corpus, source, top_k=TOP_K)
    _, plain = map_shard(corpus, captured, source, target)
    rows = tokenize_rows(corpus, source)
    records = []
    random = np.random.default_rng(1)
    position = 0
    for row in rows:
        part = slice(position, position + len(row))
        ids = flatten_column(captured, "top_ids")[0].reshape(-1, TOP_K)[part]
        tails = flatten_column(captured, "tail_logprobs")[0][part].astype(np.float32)
        codes = flatten_column(captured, "top_logprobs")[0].reshape(-1, TOP_K)[part]
        probs = decode_probs(codes.reshape(-1), ids, tails)
        drawn = np.sort(random.integers(1, source.vocab_size, (len(row), 4)), axis=1)
        logprobs = np.full(len(row), -1.0)
        records.append(TopLogprobs(ids, np.log(probs), tails, logprobs, drawn.astype(np.int32)))
        position += len(row)
    drawn_table, _ = build_captured(corpus, rows, records, source.eos_id)
    assert read_records(drawn_table).has_draws
    _, found = map_shard(corpus, drawn_table, source, target)
    assert sorted(found) == sorted(plain)
    for at, (masses, _) in plain.items():
        assert found[at][0] == pytest.approx(masses, rel=0.1)  # probabilities were encoded twice
    alignment = build_alignment(source, target, inside_tokens=True)
    table, stats = align_shard(corpus, drawn_table, alignment)
    ids = flatten_column(table, "top_ids")[0].reshape(-1, TOP_K + 4)
    is_inside = flatten_column(table, "inside_token")[0]
    assert stats["inside_tokens"] == len(plain) > 20
    assert (ids[is_inside, TOP_K:] == -1).all()


def test_prefixes_are_numbered_alike_where_tokens_begin_alike():
    tokens = [b"ab", b"", b"abc", b"b", b"abc", b"ac"]
    found = number_prefixes(tokens).tolist()
    prefixes = [token[:length] for token in tokens for length in range(1, len(token) + 1)]
    for ours, number in zip(prefixes, found, strict=True):
        assert [n == number for n in found] == [theirs == ours for theirs in prefixes]
    assert max(found) + 1 == len(set(prefixes))


def test_a_source_that_captured_no_row_has_none():
    source, target = make_pair("bytes to bytes", 0)
    corpus = make_corpus(TEXTS[:1], target, max_tokens=100)
    captured = make_captured(corpus, source, top_k=TOP_K).slice(0, 0)
    alignment = build_alignment(source, target, inside_tokens=True)
    table, stats = align_shard(corpus.slice(0, 0), captured, alignment)
    assert table.num_rows == stats["inside_tokens"] == 0
