"""Signals of conversations: captured and aligned rows, compared with plain loops."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayfuse.align.answers import align_answers, tokenize_answers
from rayfuse.align.method import build_alignment
from rayfuse.align.methods.cooccurrence import count_answer_pairs
from rayfuse.align.vocab_map import UNCHANGED, WITH_SPACE, WITHOUT_SPACE, map_vocabulary
from rayfuse.capture.chat_rows import build_chat_captured, score_conversations
from rayfuse.capture.engines.transformers_engine import TransformersEngine
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import ModelSettings
from rayfuse.corpus.documents import Document
from rayfuse.corpus.shards import build_chat_rows
from rayfuse.evaluate.answer_nll import score_answers
from rayfuse.evaluate.bits_per_byte import load_scored_model
from rayfuse.evaluate.ensemble import find_joint_ends
from rayfuse.models.chat import ChatError, ChatFormat, Message, load_chat_format, merge_system
from rayfuse.schema import ANSWERS, CAPTURED
from rayfuse.storage.chat_columns import mask_learned, read_answers, read_messages
from rayfuse.storage.codec import decode_probs, flatten_column, flatten_positions
from tests.chat.templates import FAMILIES, save_family
from tests.fakes import save_model

TALKS = [
    [
        Message("system", "You add numbers."),
        Message("user", "What is 3 plus 4?"),
        Message("assistant", "It is seven."),
        Message("user", "Are you sure?"),
        Message("assistant", "Yes, quite. 漢字!"),
    ],
    [Message("user", "Zwölf?"), Message("assistant", "42 cats\n\n    sat on the mat")],
    [Message("user", "Go on"), Message("assistant", "The cat and", is_cut=True)],
    [
        Message("user", "Think."),
        Message("assistant", "Seven.", context="<think>3 + 4</think>\n\n"),
    ],
]
TOP_K = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, ModelSettings]:
    """Save a random model of each family of templates."""
    found: dict[str, ModelSettings] = {}
    for name, family in FAMILIES.items():
        folder: Path = tmp_path_factory.mktemp(name)
        kind = "llama" if family.is_sentencepiece else "gpt_neox"
        found[name] = save_family(name, folder)
        save_model(kind, load_chat_format(found[name]).tokenizer.vocab_size + 4, folder)
    return found


def make_corpus(target: ChatFormat) -> pa.Table:
    documents = [
        Document(f"d{number}", "", join(talk), messages=tuple(talk))
        for number, talk in enumerate(TALKS)
    ]
    table, _, rejects = build_chat_rows(documents, target, [target], max_tokens=400)
    assert not rejects
    return table


def join(talk: list[Message]) -> str:
    return "".join(message.content for message in talk if message.role == "assistant")


def capture(corpus: pa.Table, source: ModelSettings) -> pa.Table:
    engine = TransformersEngine(source, CaptureSettings(top_k=TOP_K))
    encoded = load_chat_format(source).encode(read_messages(corpus))
    table, rejects = build_chat_captured(
        corpus, encoded, score_conversations(encoded, engine.score_rows)
    )
    assert not rejects
    assert table.schema.equals(CAPTURED.append(ANSWERS))
    return table


@pytest.mark.parametrize("name", FAMILIES)
def test_the_nll_of_answers_is_that_of_transformers_on_the_rendered_conversation(name, models):
    settings = models[name]
    chat = load_chat_format(settings)
    corpus = make_corpus(chat)
    captured = capture(corpus, settings)
    scored = score_answers(load_scored_model(settings), chat, corpus, name=name, batch_tokens=1000)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    model = AutoModelForCausalLM.from_pretrained(settings.model)
    for row, talk in enumerate(TALKS[:2]):
        given = talk if FAMILIES[name].takes_system else merge_system(talk)
        ids = tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in given],
            tokenize=True,
            return_dict=False,
        )
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        known = logits.clone()
        known[:, chat.tokenizer.vocab_size :] = -torch.inf  # a record has no ids without a token
        numbers = read_answers(captured)[1]
        spans = read_answers(captured)[0][numbers[row] : numbers[row + 1]].tolist()
        at = [at for start, stop, _ in spans for at in range(start, stop)]
        expected, of_all = (
            -sum(float(part.log_softmax(1)[place - 1, ids[place]]) for place in at)
            for part in (known, logits)
        )
        assert captured["nats"][row].as_py() == pytest.approx(expected, rel=1e-4)
        assert scored[row].nats.sum() == pytest.approx(of_all, rel=1e-4)
        assert scored[row].ends[-1] == corpus["num_bytes"][row].as_py()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_source_equal_to_the_target_gives_the_identity(name, models):
    chat = load_chat_format(models[name])
    corpus = make_corpus(chat)
    captured = capture(corpus, models[name])
    tokenizer = tokenize_answers(chat)
    aligned, stats = align_answers(corpus, captured, build_alignment(tokenizer, tokenizer))
    ids, offsets = flatten_column(corpus, "target_ids")
    np.testing.assert_array_equal(ids, flatten_column(captured, "token_ids")[0])
    learned = mask_learned(corpus, offsets)
    has_signal = flatten_column(aligned, "has_signal")[0]
    if name == "llama-2":  # two tokens end a turn there: only text has signals
        assert not has_signal[~learned].any()
    else:
        np.testing.assert_array_equal(has_signal, learned)
    assert stats["with_signal"] == has_signal.sum()
    at = np.flatnonzero(has_signal)
    top = flatten_positions(captured, "top_ids", len(ids))
    is_kept = (top[at] == ids[at + 1][:, None]).any(axis=1)  # else it takes the last entry's place
    for column in ("top_ids", "top_logprobs", "tail_logprobs"):
        own, theirs = (
            flatten_positions(table, column, len(ids))[at] for table in (aligned, captured)
        )
        np.testing.assert_array_equal(own[is_kept], theirs[is_kept])
        if column != "tail_logprobs":
            np.testing.assert_array_equal(own[:, :-1], theirs[:, :-1])
    np.testing.assert_array_equal(aligned["nats"].to_numpy(), captured["nats"].to_numpy())
    assert not flatten_column(aligned, "nats_per_byte")[0][~learned].any()


PAIRS = [("llama-2", "chatml"), ("chatml", "llama-2"), ("gemma", "llama-3"), ("zephyr", "phi-3")]
PAIRS += [("mistral", "gemma"), ("phi-3", "mistral"), ("llama-3", "zephyr")]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_signals_are_where_both_models_begin_at_one_byte_with_the_chains_probability(
    source, target, models
):
    ours, theirs = load_chat_format(models[source]), load_chat_format(models[target])
    corpus = make_corpus(theirs)
    captured = capture(corpus, models[source])
    alignment = build_alignment(tokenize_answers(ours), tokenize_answers(theirs))
    aligned, _ = align_answers(corpus, captured, alignment)
    expected = find_signals(captured, corpus, ours, theirs)
    ids = flatten_column(corpus, "target_ids")[0]
    has_signal = flatten_column(aligned, "has_signal")[0]
    np.testing.assert_array_equal(np.flatnonzero(has_signal), sorted(expected))
    top = flatten_positions(aligned, "top_ids", len(ids))
    tails = flatten_column(aligned, "tail_logprobs")[0]
    probs = decode_probs(flatten_column(aligned, "top_logprobs")[0], top, tails)
    for at, chain in expected.items():
        found = probs[at][top[at] == ids[at + 1]]
        # More where other source tokens also mean this target token.
        assert found.sum() > 0.95 * np.exp(chain) - 2e-4
        assert probs[at].sum() + np.exp(float(tails[at])) == pytest.approx(1, abs=5e-3)


def find_signals(
    captured: pa.Table, corpus: pa.Table, ours: ChatFormat, theirs: ChatFormat
) -> dict[int, float]:
    """Find the positions with a signal by plain loops; of each, log p of the token after it."""
    logprobs, source_offsets = flatten_column(captured, "next_logprobs")
    source_ids = flatten_column(captured, "token_ids")[0]
    target_ids, target_offsets = flatten_column(corpus, "target_ids")
    (own, own_numbers), (other, numbers) = read_answers(captured), read_answers(corpus)
    found: dict[int, float] = {}
    for row, talk in enumerate(TALKS):
        answers = [message.content for message in talk if message.role == "assistant"]
        for number, answer in enumerate(answers):
            mine = own[own_numbers[row] + number] + source_offsets[row]
            their = other[numbers[row] + number] + target_offsets[row]
            starts = list_starts(ours, source_ids, mine, answer)
            ends = mine[2] == mine[1] + 1 and their[2] == their[1] + 1
            places = list_starts(theirs, target_ids, their, answer)
            for at, byte in places.items():
                stop = next((b for a, b in places.items() if a == at + 1), len(answer.encode()))
                first = next((a for a, b in starts.items() if b == byte), None)
                if first is not None:
                    chain = [a for a, b in starts.items() if a >= first and b < stop]
                    found[at] = float(sum(logprobs[a] for a in chain or [first]))
            if ends:
                found[int(their[1]) - 1] = float(logprobs[mine[1] - 1])
    return found


def list_starts(form: ChatFormat, ids: np.ndarray, answer: np.ndarray, text: str) -> dict[int, int]:
    """Map each position that predicts a token of an answer to the byte where that token begins."""
    start, stop = int(answer[0]), int(answer[1])
    pieces = [form.tokenizer.token_bytes[i] or b"" for i in ids[start:stop]]
    extra = len(b"".join(pieces)) - len(text.encode())
    places, byte = {}, -extra
    for at, piece in zip(range(start - 1, stop - 1), pieces, strict=True):
        places[at] = max(byte, 0)
        byte += len(piece)
    return places


def has_space(form: ChatFormat, ids: np.ndarray, answer: np.ndarray, text: str) -> bool:
    """Check if the tokens of an answer begin with a space that the answer has not."""
    pieces = [form.tokenizer.token_bytes[i] or b"" for i in ids[answer[0] : answer[1]]]
    return len(b"".join(pieces)) > len(text.encode())


def save_refusing(folder: Path) -> ModelSettings:
    """Save a tokenizer whose template refuses conversations that end with a 42."""
    settings = save_family("chatml", folder)
    template = folder / "chat_template.jinja"
    guard = "{% if '42' in messages[-1]['content'] %}{{ raise_exception('no 42') }}{% endif %}"
    template.write_text(guard + template.read_text())
    return settings


def test_a_row_that_the_sources_template_refuses_has_no_signal_and_a_reason(models, tmp_path):
    settings = save_refusing(tmp_path)
    save_model("gpt_neox", 430, tmp_path)
    source, target = load_chat_format(settings), load_chat_format(models["llama-3"])
    corpus = make_corpus(target)
    encoded = source.encode(read_messages(corpus))
    assert [isinstance(row, ChatError) for row in encoded] == [False, True, False, False]
    engine = TransformersEngine(settings, CaptureSettings(top_k=TOP_K))
    captured, (reject,) = build_chat_captured(
        corpus, encoded, score_conversations(encoded, engine.score_rows)
    )
    assert reject.reason == "unusable messages: its template refuses: no 42"
    assert np.isinf(captured["nats"].to_numpy()).tolist() == [False, True, False, False]
    alignment = build_alignment(tokenize_answers(source), tokenize_answers(target))
    aligned, stats = align_answers(corpus, captured, alignment)
    has_signal, offsets = flatten_column(aligned, "has_signal")
    per_row = [int(has_signal[a:b].sum()) for a, b in pairwise(offsets)]
    assert per_row[1] == 0
    assert min(per_row[0], per_row[2], per_row[3]) > 0
    assert stats["unmatched: source: row rejected or left out"] > 0


def test_all_models_score_the_same_bytes(models):
    corpus = make_corpus(load_chat_format(models["chatml"]))
    scored = [
        score_answers(
            load_scored_model(models[name]),
            load_chat_format(models[name]),
            corpus,
            name=name,
            batch_tokens=1000,
        )
        for name in ("chatml", "llama-2", "gemma")
    ]
    for row, num_bytes in enumerate(corpus["num_bytes"].to_pylist()):
        ends = find_joint_ends([of_model[row] for of_model in scored])
        assert ends[-1] == num_bytes


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_vocabulary_map_of_answers_is_that_of_text(source, target, models):
    """A space of the template decides what is put before a token, never what a token means."""
    ours, theirs = load_chat_format(models[source]), load_chat_format(models[target])
    plain = map_vocabulary(ours.tokenizer, theirs.tokenizer)[UNCHANGED]
    of_answers = map_vocabulary(tokenize_answers(ours), tokenize_answers(theirs))
    spells = np.array([bool(token) for token in ours.tokenizer.token_bytes] + [False])
    np.testing.assert_array_equal(of_answers[UNCHANGED][spells], plain[spells])
    assert of_answers[UNCHANGED][ours.end_id] == theirs.end_id
    for space_change, change in ((WITHOUT_SPACE, without_space), (WITH_SPACE, with_space)):
        by_bytes = theirs.tokenizer.list_by_bytes()
        for token_id, token in enumerate(ours.tokenizer.token_bytes):
            goal = by_bytes.get(change(token)) if token and change(token) else None
            if goal is not None and change(token) != token and token.isascii():
                assert of_answers[space_change][token_id] == goal


def without_space(token: bytes) -> bytes:
    return token.removeprefix(b" ")


def with_space(token: bytes) -> bytes:
    return b" " + token


def test_an_answer_after_thoughts_that_end_in_a_space_has_signals(models):
    settings = models["chatml"]
    chat = load_chat_format(settings)
    talk = (
        Message("user", "Think."),
        Message("assistant", "cat sat", context="<think>x</think> "),
    )
    document = Document("d", "", "cat sat", messages=talk)
    corpus, _, rejects = build_chat_rows([document], chat, [chat], max_tokens=100)
    assert not rejects
    tokenizer = tokenize_answers(chat)
    aligned, stats = align_answers(
        corpus, capture(corpus, settings), build_alignment(tokenizer, tokenizer)
    )
    assert stats["with_signal"] == stats["positions"] > 2
    assert aligned.num_rows == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_cooccurrence_maps_the_tokens_of_answers_to_themselves(name, models):
    chat = load_chat_format(models[name])
    corpus = make_corpus(chat)
    counted = count_answer_pairs(corpus, chat, chat)
    pairs = np.stack([counted.pairs >> 32, counted.pairs & (2**32 - 1)])
    np.testing.assert_array_equal(pairs[0], pairs[1])
    ids, offsets = flatten_column(corpus, "target_ids")
    learned = np.flatnonzero(mask_learned(corpus, offsets)) + 1
    if name == "llama-2":  # two tokens end a turn there: only text is counted
        assert counted.counts.sum() == sum(
            stop - start for start, stop, _ in read_answers(corpus)[0].tolist()
        )
    else:
        expected = np.bincount(ids[learned])
        np.testing.assert_array_equal(np.bincount(pairs[0], counted.counts), expected)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_cooccurrence_counts_tokens_that_begin_at_the_same_byte_of_an_answer(
    source, target, models
):
    ours, theirs = load_chat_format(models[source]), load_chat_format(models[target])
    corpus = make_corpus(theirs)
    captured = capture(corpus, models[source])
    counted = count_answer_pairs(corpus, ours, theirs)
    expected = find_pairs(captured, corpus, ours, theirs)
    pairs = [(pair >> 32, pair & (2**32 - 1)) for pair in counted.pairs.tolist()]
    assert dict(zip(pairs, counted.counts.tolist(), strict=True)) == expected


def test_cooccurrence_skips_conversations_that_the_source_refuses(models, tmp_path):
    ours = load_chat_format(save_refusing(tmp_path))
    theirs = load_chat_format(models["llama-3"])
    corpus = make_corpus(theirs)
    skipped = count_answer_pairs(corpus, ours, theirs)
    kept = [number for number, talk in enumerate(TALKS) if "42" not in talk[-1].content]
    assert len(kept) == len(TALKS) - 1
    expected = count_answer_pairs(corpus.take(kept), ours, theirs)
    np.testing.assert_array_equal(skipped.pairs, expected.pairs)
    np.testing.assert_array_equal(skipped.counts, expected.counts)


def find_pairs(
    captured: pa.Table, corpus: pa.Table, ours: ChatFormat, theirs: ChatFormat
) -> Counter[tuple[int, int]]:
    """Count the pairs of tokens of answers that begin at one byte by plain loops."""
    source_ids, source_offsets = flatten_column(captured, "token_ids")
    target_ids, target_offsets = flatten_column(corpus, "target_ids")
    (own, own_numbers), (other, numbers) = read_answers(captured), read_answers(corpus)
    found: Counter[tuple[int, int]] = Counter()
    for row, talk in enumerate(TALKS):
        answers = [message.content for message in talk if message.role == "assistant"]
        for number, answer in enumerate(answers):
            mine = own[own_numbers[row] + number] + source_offsets[row]
            their = other[numbers[row] + number] + target_offsets[row]
            starts = list_starts(ours, source_ids, mine, answer)
            places = list_starts(theirs, target_ids, their, answer)
            by_byte = {byte: at for at, byte in reversed(starts.items())}
            if has_space(ours, source_ids, mine, answer) != has_space(
                theirs, target_ids, their, answer
            ):
                del by_byte[0]  # the same text, but not the same token
            for at, byte in places.items():
                if byte in by_byte:
                    found[int(source_ids[by_byte[byte] + 1]), int(target_ids[at + 1])] += 1
            if mine[2] == mine[1] + 1 and their[2] == their[1] + 1:
                found[int(source_ids[mine[1]]), int(target_ids[their[1]])] += 1
    return found
