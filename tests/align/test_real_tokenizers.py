"""Laws of alignment on real text and real tokenizers, compared with plain loops (`oracle.py`)."""

import os
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfuse.align.matches import Matches, match_positions
from rayfuse.align.token_spans import (
    PlacedTokens,
    TokenBytes,
    list_token_bytes,
    place_tokens,
)
from rayfuse.align.vocab_map import UNCHANGED
from rayfuse.config.base import UserError
from rayfuse.models.tokenizer import TextTokenizer
from tests.align.conftest import DOMAINS, NAMES, ODD_TEXTS, map_tokens, read_texts
from tests.align.oracle import LOSSY, count_signals, place_plainly, read_tokenizer


@dataclass(frozen=True)
class Placed:
    """Texts in one tokenizer's tokens."""

    tokens: PlacedTokens
    offsets: np.ndarray
    vocabulary: TokenBytes


def place(tokenizer: TextTokenizer, texts: list[str]) -> Placed:
    ends = [True] * len(texts)
    rows = tokenizer.encode_rows(texts, ends)
    offsets = np.cumsum([0] + [len(row) for row in rows])
    vocabulary = list_token_bytes(tokenizer)
    encoded = [text.encode() for text in texts]
    return Placed(
        place_tokens(np.concatenate(rows), offsets, encoded, vocabulary, ends), offsets, vocabulary
    )


@pytest.fixture(scope="module")
def plain_tokenizers(shared_data: Path) -> dict[str, object]:
    return {name: read_tokenizer(shared_data / "tokenizers" / name) for name in NAMES}


def check_ends(placed: Placed, texts: list[str], *, is_lossless: bool) -> None:
    """Ends never decrease, and reach the end of the text."""
    start = 0
    for row, text in enumerate(texts):
        part = slice(placed.offsets[row], placed.offsets[row + 1])
        ends = placed.tokens.ends[part]
        num_bytes = len(text.encode())
        assert (np.diff(ends) >= 0).all()
        assert (ends >= start).all() and (ends <= start + num_bytes).all()
        if is_lossless and len(ends):
            assert ends[-1] == start + num_bytes
        start += num_bytes + 1


def test_odd_texts_are_placed_and_matched_as_plain_loops_say(tokenizers, plain_tokenizers):
    check_against_loops(ODD_TEXTS, tokenizers, plain_tokenizers, is_real=False)


awkward_text = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(list(" \n\t\r<s>/unk|[]#▁Ġé\u0301\u200d👩ﬁ①漢")),
    ),
    min_size=1,
    max_size=60,
)


def test_any_text_is_placed_and_matched_as_plain_loops_say(tokenizers, plain_tokenizers):
    @settings(max_examples=400 if os.environ.get("RAYFUSE_LONG_CHAOS") else 150, deadline=None)
    @given(texts=st.lists(awkward_text, min_size=1, max_size=4))
    def check(texts: list[str]) -> None:
        check_against_loops(texts, tokenizers, plain_tokenizers, is_real=False)

    check()


def check_against_loops(texts, tokenizers, plain_tokenizers, *, is_real: bool) -> None:
    """Every pair matches as many positions as the loops of `oracle.py` count."""
    placed = {name: place(tokenizers[name], texts) for name in NAMES}
    plain = {
        name: [place_plainly(name, plain_tokenizers[name], text) for text in texts]
        for name in NAMES
    }
    for name in NAMES:
        check_ends(placed[name], texts, is_lossless=is_real and name not in LOSSY)
    for source, target in permutations(NAMES, 2):
        matches = match_positions(placed[source].tokens, placed[target].tokens)
        check_matches(matches, placed[source].tokens, placed[target].tokens)
        expected = sum(
            count_signals(source, ours, target, theirs)
            for ours, theirs in zip(plain[source], plain[target], strict=True)
        )
        assert len(matches.target_at) == expected, (source, target)


@pytest.mark.parametrize("name", NAMES)
def test_a_lone_surrogate_is_refused(name, tokenizers):
    with pytest.raises(UserError, match="tokenizer"):
        tokenizers[name].encode(["lone \ud800 surrogate"])


@pytest.mark.parametrize("name", NAMES)
def test_markers_in_a_text_are_never_control_tokens(name, tokenizers):
    tokenizer = tokenizers[name]
    controls = {tokenizer.start_id, tokenizer.eos_id} - {None}
    for ids in tokenizer.encode(["<s> a </s> b <|endoftext|><|padding|><pad>[CLS] [SEP]"]):
        assert not controls & set(ids.tolist())


@pytest.mark.parametrize("domain", DOMAINS)
def test_coverage_is_the_share_of_boundaries_that_plain_loops_find(
    domain, tokenizers, plain_tokenizers, shared_data
):
    """Every pair of the eight tokenizers, all validation text of the domain."""
    texts = read_texts(shared_data, domain)
    check_against_loops(texts, tokenizers, plain_tokenizers, is_real=True)


def check_matches(matches: Matches, source: PlacedTokens, target: PlacedTokens) -> None:
    """Each match starts at one byte on both sides, and every position is counted once."""
    np.testing.assert_array_equal(source.ends[matches.source_at], target.ends[matches.target_at])
    is_text = ~target.next_is_eos[matches.target_at]
    reached = source.ends[matches.source_stop[is_text]]
    assert (reached >= target.ends[matches.target_at[is_text] + 1]).all()
    assert sum(matches.unmatched.values()) + len(matches.target_at) == target.has_next.sum()


def test_coverage_of_llama_2_by_neox_is_what_was_seen_elsewhere(tokenizers, shared_data):
    least = {"wiki": 0.80, "code": 0.83, "multilingual": 0.85}
    for domain, share in least.items():
        texts = read_texts(shared_data, domain)
        source, target = (
            place(tokenizers[n], texts).tokens for n in ("gpt-neox-20b", "phi-3-mini")
        )
        assert len(match_positions(source, target).target_at) / target.has_next.sum() > share


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_aligned_with_itself_is_the_identity(name, tokenizers, shared_data):
    texts = [*ODD_TEXTS, *read_texts(shared_data, "multilingual")[:20]]
    tokens = place(tokenizers[name], texts).tokens
    matches = match_positions(tokens, tokens)
    np.testing.assert_array_equal(matches.target_at, np.flatnonzero(tokens.can_match))
    np.testing.assert_array_equal(matches.source_at, matches.target_at)
    np.testing.assert_array_equal(matches.source_stop, matches.target_at + 1)
    own = map_tokens(tokenizers[name], tokenizers[name], only_equal=False)
    mapped = own[UNCHANGED, :-1]
    spelled = np.array([bool(token) for token in tokenizers[name].token_bytes])
    np.testing.assert_array_equal(mapped[spelled], np.flatnonzero(spelled))


def begins_with(tokenizer: TextTokenizer, spelled: bytes, token_id: int) -> bool:
    """Whether this token is the first of a text, whose characters the tokenizer changes."""
    point, text = tokenizer.encode([".", "." + spelled.decode()])
    if not tokenizer.adds_prefix_space:
        point, text = tokenizer.encode(["", spelled.decode()])
    return text[: len(point)].tolist() == point.tolist() and text[len(point)] == token_id


@pytest.mark.parametrize(("source", "target"), list(permutations(NAMES, 2)))
def test_every_mapped_token_begins_with_what_it_is_mapped_to(source, target, tokenizers):
    ours, theirs = tokenizers[source], tokenizers[target]
    known = ours.list_by_bytes().keys() & theirs.list_by_bytes().keys()
    mapped = map_tokens(ours, theirs, only_equal=False)[UNCHANGED]
    only_equal = map_tokens(ours, theirs, only_equal=True)[UNCHANGED]
    for token_id, spelled in enumerate(ours.token_bytes):
        goal = theirs.token_bytes[mapped[token_id]] if mapped[token_id] >= 0 else None
        if spelled and goal is not None:
            assert spelled.startswith(goal) or (
                not theirs.implies_prefix_space and begins_with(theirs, spelled, mapped[token_id])
            )
            assert (only_equal[token_id] == mapped[token_id]) == (spelled in known)
        if only_equal[token_id] >= 0:  # `exact` is a part of `bytes`
            assert only_equal[token_id] == mapped[token_id]
    if ours.eos_id is not None:
        assert mapped[ours.eos_id] == (-1 if theirs.eos_id is None else theirs.eos_id)
