"""The ensemble is the mean of its sources' probabilities of the same bytes."""

import math
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayfuse.config.models import ModelSettings
from rayfuse.evaluate.bits_per_byte import load_scored_model, score_rows, score_tokens
from rayfuse.evaluate.ensemble import TokenNLL, average_sources, find_joint_ends
from rayfuse.models.causal_lm import CausalLM
from rayfuse.models.tokenizer import TextTokenizer, load_tokenizer
from tests.fakes import byte_level_tokenizer, save_model, save_tokenizer, sentencepiece_tokenizer

Model = tuple[CausalLM, TextTokenizer]


def token_nll(ends: list[int], nats: list[float]) -> TokenNLL:
    return TokenNLL(np.array(ends), np.array(nats))


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    """Provide a function that makes a random model of a family, seed and kind of tokenizer."""

    def make(family: str, seed: int, kind: str = "bytes", vocab_size: int = 257) -> Model:
        folder = tmp_path_factory.mktemp(f"{family}-{seed}")
        is_bytes = kind == "bytes"
        train = byte_level_tokenizer if is_bytes else sentencepiece_tokenizer
        tokenizer = train(vocab_size)
        save_model(family, tokenizer.get_vocab_size(), folder)
        bos, eos = (None, "<|end|>") if is_bytes else ("<s>", "</s>")
        save_tokenizer(tokenizer, folder, bos=bos, eos=eos)
        lm = load_scored_model(ModelSettings(model=str(folder), dtype="float32"))
        torch.manual_seed(seed)
        for weight in lm.model.parameters():  # far enough from uniform that models disagree
            weight.data.add_(0.3 * torch.randn_like(weight))
        return lm, load_tokenizer(str(folder))

    return make


def score(model: Model, rows: pa.Table) -> list[TokenNLL]:
    return score_tokens(*model, rows, name="tiny", batch_tokens=500)


def next_probs(model: Model, text: str) -> tuple[np.ndarray, list[int]]:
    """Return the model's dense distributions over a text's tokens, and these tokens."""
    lm, tokenizer = model
    ids = tokenizer.encode([text])[0].tolist()
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([[tokenizer.start_id, *ids]])).logits[0, :-1]
    return logits.double().softmax(1).numpy(), ids


def test_with_one_tokenizer_it_is_the_mean_of_the_dense_distributions(load, rows):
    models = [load("llama", 1), load("gpt_neox", 2), load("gpt2", 3)]
    found = [average_sources(row) for row in zip(*(score(m, rows) for m in models), strict=True)]
    for text, ensemble in zip(rows["text"].to_pylist(), found, strict=True):
        dense = [next_probs(model, text) for model in models]
        mean = np.mean([probs for probs, _ in dense], axis=0)
        expected = -np.log(mean[np.arange(len(mean)), dense[0][1]])
        np.testing.assert_allclose(ensemble.nats, expected, rtol=1e-4)
        assert ensemble.ends[-1] == len(text.encode())


def test_with_several_tokenizers_it_is_the_mean_over_joint_chunks_of_dense_products(load, rows):
    models = [
        load("llama", 4),
        load("gpt_neox", 5, vocab_size=320),
        load("mistral", 6, kind="sentencepiece", vocab_size=300),
    ]
    found = [average_sources(row) for row in zip(*(score(m, rows) for m in models), strict=True)]
    for text, ensemble in zip(rows["text"].to_pylist(), found, strict=True):
        spans, products = [], []
        for model in models:
            probs, ids = next_probs(model, text)
            # Brute force: the end of each token, by spelling all tokens up to it.
            spelled = [model[1].token_bytes[token_id] or b"" for token_id in ids]
            extra = len(b"".join(spelled)) - len(text.encode())  # a prefix space
            stops = [max(0, len(b"".join(spelled[: i + 1])) - extra) for i in range(len(ids))]
            spans.append(stops)
            products.append([probs[i, token_id] for i, token_id in enumerate(ids)])
        joint = sorted(set.intersection(*map(set, spans)))
        total, start = 0.0, -1
        for stop in joint:
            chances = [
                math.prod(p for p, end in zip(probs, ends, strict=True) if start < end <= stop)
                for probs, ends in zip(products, spans, strict=True)
            ]
            total -= math.log(sum(chances) / len(chances))
            start = stop
        assert ensemble.nats.sum() == pytest.approx(total, rel=1e-4)
        assert ensemble.ends.tolist() == joint


def test_the_nll_of_tokens_adds_up_to_that_of_the_row(load, rows):
    model = load("llama", 7)
    windowed = score_tokens(*model, rows, name="tiny", batch_tokens=40, context_tokens=8)
    row_nats = score_rows(*model, rows, name="tiny", batch_tokens=40, context_tokens=8)
    np.testing.assert_allclose([row.nats.sum() for row in windowed], row_nats)
    for row, text in zip(windowed, rows["text"].to_pylist(), strict=True):
        assert row.ends.tolist() == list(range(1, len(text.encode()) + 1))  # a byte a token
        assert len(row.nats) == len(row.ends)


def test_by_hand_two_sources_meet_where_both_tokens_end():
    a = token_nll([2, 5], [math.log(2), math.log(4)])  # 1/2, 1/4
    b = token_nll([3, 5], [math.log(4), math.log(4)])  # 1/4, 1/4: they meet at 5 alone
    ensemble = average_sources([a, b])
    assert ensemble.ends.tolist() == [5]
    assert ensemble.nats.tolist() == pytest.approx([-math.log((1 / 8 + 1 / 16) / 2)])


def test_a_prefix_space_belongs_to_the_chunk_of_the_bytes_after_it():
    a = token_nll([0, 3], [1.0, 2.0])  # the first token is a prefix space alone
    b = token_nll([3], [3.0])
    assert average_sources([a, b]).nats.tolist() == pytest.approx([3.0])


def test_sources_of_other_texts_are_refused():
    with pytest.raises(ValueError, match=r"spell \[3, 4\] bytes of one row"):
        find_joint_ends([token_nll([3], [1.0]), token_nll([2, 4], [1.0, 1.0])])


LENGTHS = st.lists(st.integers(1, 4), min_size=1, max_size=12)


@st.composite
def sources_of_one_row(draw: st.DrawFn) -> list[TokenNLL]:
    num_bytes = draw(st.integers(1, 20))
    found = []
    for _ in range(draw(st.integers(1, 4))):
        inner = draw(st.sets(st.integers(1, num_bytes)))
        ends = sorted(inner | {num_bytes})
        nats = draw(st.lists(st.floats(0, 30), min_size=len(ends), max_size=len(ends)))
        found.append(token_nll(ends, nats))
    return found


@given(sources_of_one_row())
def test_one_source_or_copies_of_it_have_the_nll_of_that_source(sources: list[TokenNLL]):
    for source in sources:
        for copies in (1, 3):
            ensemble = average_sources([source] * copies)
            assert ensemble.nats.sum() == pytest.approx(source.nats.sum())


@given(sources_of_one_row())
def test_the_nll_of_a_chunk_lies_between_the_best_source_and_the_mean(sources: list[TokenNLL]):
    ensemble = average_sources(sources)
    totals = [source.nats.sum() for source in sources]
    assert ensemble.nats.sum() <= np.mean(totals) + 1e-9  # Jensen, chunk by chunk
    reordered = average_sources(sources[::-1])
    np.testing.assert_allclose(reordered.nats, ensemble.nats)
    assert (
        ensemble.nats.sum()
        >= sum(
            min(
                source.nats[(source.ends > start) & (source.ends <= stop)].sum()
                for source in sources
            )
            for start, stop in zip([0, *ensemble.ends[:-1]], ensemble.ends, strict=True)
        )
        - 1e-9
    )
