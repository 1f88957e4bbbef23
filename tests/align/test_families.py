"""Every family of tokenizers, trained on the spot: what its tokens spell and where they end."""

import json

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from benchmarks.synthetic import make_captured, make_corpus
from rayfuse.align.matches import NO_SHARED_BOUNDARY, NO_TOKENS, ONE_SIDED, match_positions
from rayfuse.align.method import build_alignment
from rayfuse.align.shard import align_shard
from rayfuse.align.token_spans import (
    Fault,
    PlacedTokens,
    TokenBytes,
    list_token_bytes,
    place_tokens,
)
from rayfuse.align.vocab_map import (
    UNCHANGED,
    WITH_SPACE,
    WITHOUT_SPACE,
    map_vocabulary,
)
from rayfuse.models.text_tokenizer import TextTokenizer, build_tokenizer
from tests.fakes import SAMPLE, byte_level_tokenizer, sentencepiece_tokenizer

TEXTS = [
    *SAMPLE,
    "  two  blanks\n\n\tand tabs  ",
    "日本語 and emoji 👩‍👩‍👧, 1234567 e\u0301",
    " x",
    "x",
]
LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE_MARK = "\u2581"


def byte_level_with(*before: pre_tokenizers.PreTokenizer, use_regex: bool, nfc: bool = False):
    """A byte-level BPE whose text is split in a family's own way first."""
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, last])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    return tokenizer


def unigram(*, byte_fallback: bool, adds_prefix_space: bool) -> Tokenizer:
    """A SentencePiece unigram model, with or without bytes and dummy prefix."""
    tokenizer = Tokenizer(models.Unigram())
    scheme = "always" if adds_prefix_space else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    content = json.loads(tokenizer.to_str())
    if byte_fallback:
        worst = min(score for _, score in content["model"]["vocab"])
        content["model"]["vocab"] += [[f"<0x{byte:02X}>", worst - 5] for byte in range(256)]
        content["model"]["byte_fallback"] = True
        kinds = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
        content["decoder"] = json.loads(decoders.Sequence(kinds).__getstate__())
    else:
        content["decoder"] = json.loads(decoders.Metaspace().__getstate__())
    return Tokenizer.from_str(json.dumps(content))


def sentencepiece_without_prefix() -> Tokenizer:
    content = json.loads(sentencepiece_tokenizer(330).to_str())
    content["normalizer"] = content["normalizer"]["normalizers"][1]
    return Tokenizer.from_str(json.dumps(content))


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=250, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    return tokenizer


def character_level() -> Tokenizer:
    characters = sorted(set("".join(TEXTS)) - {"漢"})
    vocabulary = {"[UNK]": 0, "[E]": 1} | {c: i + 2 for i, c in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), "isolated")
    return tokenizer


def build(tokenizer: Tokenizer, start: int | None = 1, eos: int | None = 2) -> TextTokenizer:
    return build_tokenizer(tokenizer.to_str(), start_id=start, eos_id=eos)


LOSSLESS = {
    "gpt-2": build(byte_level_tokenizer(360), 0, 0),
    "llama-3": build(
        byte_level_with(pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), "isolated"), use_regex=False),
        0,
        0,
    ),
    "falcon": build(
        byte_level_with(
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
            use_regex=True,
        ),
        0,
        0,
    ),
    "llama-2": build(sentencepiece_tokenizer(330)),
    "no dummy prefix": build(sentencepiece_without_prefix()),
    "unigram, bytes": build(unigram(byte_fallback=True, adds_prefix_space=True)),
    "unigram, bytes, no dummy prefix": build(unigram(byte_fallback=True, adds_prefix_space=False)),
}
LOSSY = {
    "qwen (NFC)": build(
        byte_level_with(
            pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), "isolated"), use_regex=False, nfc=True
        ),
        0,
        0,
    ),
    "unigram, no bytes": build(unigram(byte_fallback=False, adds_prefix_space=True)),
    "wordpiece": build(wordpiece(), None, None),
    "characters": build(character_level(), 1, 1),
}
FAMILIES = LOSSLESS | LOSSY


def place(tokenizer: TextTokenizer, texts: list[str]) -> tuple[PlacedTokens, np.ndarray]:
    ends = [True] * len(texts)
    rows = tokenizer.encode_rows(texts, ends)
    offsets = np.cumsum([0] + [len(row) for row in rows])
    encoded = [text.encode() for text in texts]
    vocabulary = list_token_bytes(tokenizer)
    placed = place_tokens(np.concatenate(rows), offsets, encoded, vocabulary, ends)
    return placed, offsets


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_families_spell_every_text_to_its_last_byte(name):
    placed, offsets = place(LOSSLESS[name], TEXTS)
    assert not placed.faults.any()
    start = 0
    for row, text in enumerate(TEXTS):
        assert placed.ends[offsets[row + 1] - 1] == start + len(text.encode())
        start += len(text.encode()) + 1


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_families_are_placed_where_they_spell_the_text_and_say_why_not_elsewhere(name):
    placed, _ = place(LOSSY[name], TEXTS)
    share = (placed.faults == Fault.NONE)[placed.has_next].mean()
    assert 0.3 < share < 1
    assert (np.diff(placed.ends) >= 0).all()


@pytest.mark.parametrize("target", FAMILIES)
@pytest.mark.parametrize("source", FAMILIES)
def test_every_family_can_teach_every_other(source, target):
    ours, theirs = FAMILIES[source], FAMILIES[target]
    silent = "\x07"  # no token at all to WordPiece
    corpus = make_corpus([silent, *TEXTS[:3], silent, *TEXTS[3:], silent], theirs, max_tokens=20)
    assert corpus.num_rows > len(TEXTS) + 3  # some rows end no document
    captured = make_captured(corpus, ours, top_k=6)
    alignment = build_alignment(ours, theirs)
    _, stats = align_shard(corpus, captured, alignment)
    lost = sum(count for reason, count in stats.items() if reason.startswith("unmatched"))
    assert stats["with_signal"] + lost == stats["positions"]
    assert stats["with_signal"] > 0.15 * stats["positions"]


@pytest.mark.parametrize("target", FAMILIES)
@pytest.mark.parametrize("source", FAMILIES)
def test_no_position_is_said_to_be_inside_a_source_token_that_is_not(source, target):
    texts = [*TEXTS, "a b\n\n", "\u200b\u200b", "\x07 a "]
    (ours, _), (theirs, offsets) = (place(FAMILIES[each], texts) for each in (source, target))
    starts_inside = 0
    for row in range(len(texts)):
        part = slice(ours.offsets[row], ours.offsets[row + 1])
        ends = ours.ends[part].tolist()
        ends = ends[:-1] if ours.next_is_eos[part].any() else ends  # EOS has no inside
        pairs = list(zip([int(ours.row_starts[row]), *ends], ends, strict=False))
        for at in range(offsets[row], offsets[row + 1] - 1):
            begins = theirs.ends[at]
            is_inside = any(low < begins < high for low, high in pairs) and begins not in ends
            starts_inside += is_inside and not theirs.faults[at]
    unmatched = match_positions(ours, theirs).unmatched
    assert unmatched.get(NO_SHARED_BOUNDARY, 0) == starts_inside


def test_positions_lost_at_the_ends_of_a_text_are_counted_as_that():
    cases = {
        ("wordpiece", "gpt-2", "the cat"): {ONE_SIDED: 2},  # no start token, no EOS
        ("wordpiece", "gpt-2", "the cat\n\n"): {ONE_SIDED: 1, "source: dropped text": 3},
        ("wordpiece", "gpt-2", "\x07"): {NO_TOKENS: 2},
    }
    for (source, target, text), reasons in cases.items():
        ours, theirs = (place(FAMILIES[each], [text])[0] for each in (source, target))
        unmatched = match_positions(ours, theirs).unmatched
        assert {key: unmatched.get(key) for key in reasons} == reasons, (text, unmatched)


def test_blanks_that_one_side_adds_are_taken_off_or_put_on():
    plain, prefixed = LOSSLESS["gpt-2"], LOSSLESS["llama-2"]
    for source, target, view in ((plain, prefixed, WITH_SPACE), (prefixed, plain, WITHOUT_SPACE)):
        ours, theirs = (place(each, ["The cat", "cat"])[0] for each in (source, target))
        matches = match_positions(ours, theirs)
        assert 0 in matches.target_at  # the first token of the text has a signal too
        maps, goals = map_vocabulary(source, target)[view], target.list_by_bytes()
        for spelled, token_id in source.list_by_bytes().items():
            meant = b" " + spelled if view == WITH_SPACE else spelled.removeprefix(b" ")
            if meant in goals:
                assert maps[token_id] == goals[meant]


@pytest.mark.parametrize("flags", [{"lstrip": True}, {"rstrip": True}, {"normalized": True}, {}])
def test_added_tokens_of_every_flag_leave_the_rest_of_the_row_placed(flags):
    tokenizer = byte_level_tokenizer(300)
    tokenizer.add_tokens([AddedToken("cat sat", **flags)])
    text = "The   cat sat   on the mat, and the dog looked.\n"
    placed, _ = place(build(tokenizer, 0, 0), [text])
    assert placed.ends[-1] == len(text)
    swallows = bool({"lstrip", "rstrip"} & set(flags))
    assert (placed.faults > 0).sum() == swallows  # the blanks it swallowed are not what it spells


TAKEN_APART = "the cats, 漢字 and 👩 sat; "


@pytest.mark.parametrize("name", FAMILIES)
def test_every_token_without_a_fault_spells_the_bytes_it_covers(name):
    tokenizer = FAMILIES[name]
    texts = [*TEXTS, TAKEN_APART + "e\u0301 " + TAKEN_APART]
    placed, offsets = place(tokenizer, texts)
    for row, text in enumerate(texts):
        begins = placed.row_starts[row]
        for at in range(offsets[row], offsets[row + 1] - 1):
            spelled = tokenizer.token_bytes[placed.ids[at + 1]] or b""
            covered = slice(placed.ends[at] - begins, placed.ends[at + 1] - begins)
            if not placed.faults[at] and not placed.next_is_eos[at]:
                added = b" " if placed.next_has_prefix_space[at] else b""
                assert spelled == added + text.encode()[covered]


def test_text_changed_in_one_place_leaves_parts_of_characters_placed_elsewhere():
    """Offsets count characters; tokens that share one are told apart by what they spell."""
    tokenizer = FAMILIES["qwen (NFC)"]
    calm, changed = (
        place(tokenizer, [TAKEN_APART + accented + TAKEN_APART])[0]
        for accented in ("\u00e9 ", "e\u0301 ")
    )
    np.testing.assert_array_equal(calm.ids, changed.ids)
    spelled = [tokenizer.token_bytes[i] or b"" for i in calm.ids.tolist()]
    assert sum(0x80 <= token[0] < 0xC0 for token in spelled if token) > 5
    assert not calm.faults.any()
    # The two bytes of the letter, and the blank, which is given the accent.
    assert (changed.faults > 0).sum() == 3
    assert ((changed.ends - calm.ends)[changed.ends > len(TAKEN_APART.encode()) + 3] == 1).all()


def test_ids_that_the_vocabulary_leaves_out_spell_nothing():
    content = json.loads(byte_level_tokenizer(300).to_str())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: i + 5 * (i > 10) for token, i in vocabulary.items()}
    tokenizer = build_tokenizer(json.dumps(content), start_id=0, eos_id=0)
    assert tokenizer.token_bytes[11:16] == (None,) * 5
    assert not place(tokenizer, TEXTS)[0].faults.any()
    assert (map_vocabulary(tokenizer, LOSSLESS["llama-2"])[UNCHANGED, 11:16] == -1).all()


@pytest.mark.parametrize("source", FAMILIES)
def test_what_a_source_says_of_a_row_depends_on_that_row_alone(source):
    """Also where the source leaves out the end of the text, as WordPiece does a last blank."""
    ours, theirs = FAMILIES[source], LOSSLESS["llama-2"]
    texts = ["two cats  ", "The dog looked.\n ", "a\x07 ", *TEXTS]
    corpus = make_corpus(texts, theirs, max_tokens=1024)
    captured = make_captured(corpus, ours, top_k=4)
    alignment = build_alignment(ours, theirs)
    together, _ = align_shard(corpus, captured, alignment)
    for row in range(corpus.num_rows):
        alone, _ = align_shard(corpus.slice(row, 1), captured.slice(row, 1), alignment)
        assert alone.to_pylist() == together.slice(row, 1).to_pylist()
        nats = np.array(alone["nats_per_byte"].to_pylist()[0], dtype=float)
        lengths = np.append(theirs.count_bytes()[corpus["target_ids"].to_pylist()[row][1:]], 0)
        lengths[0] -= theirs.adds_prefix_space and lengths[0] > 0
        # No more than the row's own: what a token of no bytes costs falls on no byte.
        assert (nats * lengths).sum() <= alone["nats"].to_pylist()[0] * (1 + 1e-3)


def reads_markers(eos: str = "</s>") -> TextTokenizer:
    """A unigram model that reads a literal EOS in a text as its own EOS, as T5's does."""
    content = json.loads(unigram(byte_fallback=False, adds_prefix_space=True).to_str())
    content["added_tokens"] = [each for each in content["added_tokens"] if each["id"] != 2]
    content["model"]["vocab"][2][1] = 0.0
    tokenizer = build(Tokenizer.from_str(json.dumps(content)))
    assert tokenizer.encode(["a" + eos])[0][-1] == tokenizer.eos_id
    return tokenizer


@pytest.mark.parametrize("ends", [True, False])
def test_a_text_that_ends_with_a_literal_eos_ends_its_document_only_where_the_corpus_says(ends):
    tokenizer, text = reads_markers(), "The cat sat</s>"
    (ids,) = tokenizer.encode_rows([text], [ends])
    vocabulary, offsets = list_token_bytes(tokenizer), np.array([0, len(ids)])
    placed = place_tokens(ids, offsets, [text.encode()], vocabulary, [ends])
    assert placed.next_is_eos.sum() == ends
    assert placed.ends[-1] == len(text)
    assert Fault.UNKNOWN_TOKEN in placed.faults


def test_rows_without_the_eos_or_the_start_token_that_they_must_have_are_refused():
    tokenizer = LOSSLESS["llama-2"]
    vocabulary, (ids,) = list_token_bytes(tokenizer), tokenizer.encode_rows(["The cat"], [True])
    for wrong, ends in ((ids[:-1], True), (ids[1:], True), (ids[:1], True), (ids[1:-1], False)):
        with pytest.raises(ValueError, match=r"row 0: its tokens begin \[.*begin with 1 and"):
            place_tokens(wrong, np.array([0, len(wrong)]), [b"The cat"], vocabulary, [ends])


def test_a_first_token_that_spells_nothing_has_no_blank_to_take_off():
    tokens = [b"", b" a", b""]  # the last begins where the vocabulary's bytes end
    vocabulary = TokenBytes(
        lengths=np.array([0, 2, 0]),
        starts=np.array([0, 0, 2]),
        blob=np.frombuffer(b"".join(tokens), dtype=np.uint8),
        adds_prefix_space=True,
        eos_id=None,
        start_id=None,
        tokenizer=None,
    )
    for first in (0, 2):  # one would read the next token's blank, one beyond the last byte
        ids = np.array([first, 1], dtype=np.int32)
        placed = place_tokens(ids, np.array([0, 2]), [b" a"], vocabulary, [False])
        assert placed.ends.tolist() == [0, 2]
        assert not placed.next_has_prefix_space.any()
