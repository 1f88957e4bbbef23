"""The target token that a source token is mapped to: its own bytes, or those that begin them."""

import numpy as np
import pytest
from tokenizers import normalizers

from benchmarks.synthetic import make_captured, make_corpus
from rayfuse.align.method import build_alignment
from rayfuse.align.shard import align_shard
from rayfuse.align.vocab_map import UNCHANGED, find_unfinished, map_vocabulary
from tests.align.test_families import FAMILIES, LOSSLESS, build
from tests.fakes import byte_level_tokenizer, sentencepiece_tokenizer


def test_a_token_that_ends_inside_a_character_is_mapped_only_where_that_is_certain():
    """A target with tokens for characters uses byte tokens for the others alone."""
    levels, fallback = LOSSLESS["gpt-2"], FAMILIES["unigram, bytes"]
    byte_tokens = {fallback.token_bytes[i]: i for i in np.flatnonzero(fallback.byte_ids())}
    assert len(byte_tokens) == 256
    for only_equal in (False, True):
        mapped = map_vocabulary(levels, fallback, only_equal=only_equal)[UNCHANGED]
        own = map_vocabulary(fallback, LOSSLESS["llama-2"], only_equal=only_equal)[UNCHANGED]
        back = map_vocabulary(fallback, levels, only_equal=only_equal)[UNCHANGED]
        for byte in range(256):
            token_id = levels.list_by_bytes()[bytes([byte])]
            assert (mapped[token_id] == -1) == (byte >= 0xC0)  # others go on with a character
            byte_id = byte_tokens[bytes([byte])]
            assert LOSSLESS["llama-2"].token_names[own[byte_id]] == f"<0x{byte:02X}>"
            assert back[byte_id] == token_id


@pytest.mark.parametrize(
    ("token", "start"),
    [
        (b"", 0),
        (b"a", 1),
        ("\u6f22".encode(), 3),
        ("\u6f22".encode()[:1], 0),
        ("\u6f22".encode()[:2], 0),
        ("\u6f22".encode()[1:], 2),
        ("\u00e9".encode()[:1], 0),
        ("a\U0001f469".encode()[:4], 1),
        ("a\U0001f469".encode(), 5),
        ("\u6f22".encode() + b"\xe5", 3),
        (b" \xe5\xad", 1),
    ],
)
def test_where_a_character_begins_that_a_token_does_not_finish(token, start):
    assert find_unfinished(token) == start


@pytest.mark.parametrize(("name", "target"), LOSSLESS.items())
def test_what_a_token_is_mapped_to_begins_every_text_that_it_begins(name, target):
    """A blank and half a character: is the target's first token the blank, whatever it will be?"""
    source = LOSSLESS["gpt-2"]
    mapped = map_vocabulary(source, target)[UNCHANGED]
    for token_id, spelled in enumerate(source.token_bytes):
        start = find_unfinished(spelled or b"")
        if not spelled or start == len(spelled) or mapped[token_id] < 0:
            continue
        goal = target.token_bytes[mapped[token_id]] or b""
        assert goal == spelled or len(goal) < max(start, 1) or spelled[0] < 0xC0, (name, spelled)


@pytest.mark.parametrize(
    ("normalizer", "changed"),
    [
        (normalizers.NFC(), "\u212b"),
        (normalizers.NFKC(), "\ufb01"),
        (normalizers.Lowercase(), "\u00c4"),
    ],
)
def test_characters_that_the_target_changes_go_to_its_own_first_token(normalizer, changed):
    """Not to a byte piece of the text, which the target never has in this place."""
    backend = byte_level_tokenizer(300)
    backend.normalizer = normalizer
    target = build(backend, start=0, eos=0)
    source = build(byte_level_tokenizer(400, [changed * 3, changed]), start=0, eos=0)
    token_id = source.list_by_bytes()[changed.encode()]
    own = target.encode([changed])[0]
    assert map_vocabulary(source, target)[UNCHANGED, token_id] == own[0]


@pytest.mark.parametrize("text", ["\nThe cat sat", "\u6f22\u5b57 and the cat", "The cat sat"])
def test_the_bytes_of_a_row_have_all_of_its_nll_if_it_begins_with_a_prefix_space_alone(text):
    source, target = build(sentencepiece_tokenizer(300)), LOSSLESS["gpt-2"]
    corpus = make_corpus([text], target, max_tokens=512)
    captured = make_captured(corpus, source, top_k=4)
    if not text.startswith("The"):
        assert source.token_bytes[captured["token_ids"].to_pylist()[0][1]] == b" "
    aligned, _ = align_shard(corpus, captured, build_alignment(source, target))
    (nats,) = aligned["nats_per_byte"].to_pylist()
    lengths = target.count_bytes()[corpus["target_ids"].to_pylist()[0]]
    total = sum(nat * length for nat, length in zip(nats, [*lengths[1:], 0], strict=True))
    assert total == pytest.approx(aligned["nats"].to_pylist()[0], rel=2e-3)  # float16
