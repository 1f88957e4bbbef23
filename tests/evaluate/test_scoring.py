"""The NLL of rows scored in batches equals that of the model's own logits."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from rayfuse.config.models import ModelSettings
from rayfuse.evaluate.bits_per_byte import load_scored_model, score_documents, score_rows
from rayfuse.evaluate.scores import DocumentScore
from rayfuse.models.causal_lm import CausalLM
from rayfuse.models.tokenizer import TextTokenizer, load_tokenizer
from rayfuse.storage.codec import number_documents


@pytest.fixture(scope="module")
def folder(make_model: Callable[[int], Path]) -> Path:
    return make_model(260)  # wider than the tokenizer, as real heads are


@pytest.fixture(scope="module")
def lm(folder: Path) -> CausalLM:
    return load_scored_model(ModelSettings(model=str(folder), dtype="float32"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> TextTokenizer:
    return load_tokenizer(str(folder))


def score(lm: CausalLM, tokenizer: TextTokenizer, rows: pa.Table, tokens: int) -> np.ndarray:
    return score_rows(lm, tokenizer, rows, name="tiny", batch_tokens=tokens)


def test_the_nll_of_rows_is_that_of_the_models_own_logits(lm, tokenizer, rows):
    expected = []
    for text in rows["text"].to_pylist():
        ids = torch.tensor([[tokenizer.start_id, *tokenizer.encode([text])[0]]])
        with torch.no_grad():
            logprobs = lm.model(input_ids=ids).logits[0].double().log_softmax(1)
        following = ids[0, 1:]
        expected.append(-logprobs[:-1].gather(1, following[:, None]).sum().item())
    np.testing.assert_allclose(score(lm, tokenizer, rows, 16_384), expected, rtol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 30, 60])
def test_batches_and_padding_do_not_change_a_score(lm, tokenizer, rows, batch_tokens):
    alone = [score(lm, tokenizer, rows.slice(i, 1), 1)[0] for i in range(rows.num_rows)]
    together = score(lm, tokenizer, rows, batch_tokens)
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_every_byte_is_scored_and_nothing_else(lm, tokenizer, rows):
    with torch.no_grad():
        uniform = replace(lm, head=torch.nn.Linear(32, lm.head.out_features, bias=False))
        uniform.head.weight.zero_()
    nats = score(uniform, tokenizer, rows, 100)
    expected = np.array(rows["num_bytes"].to_pylist()) * math.log(lm.head.out_features)
    np.testing.assert_allclose(nats, expected, rtol=1e-6)  # one token a byte: no EOS, no start


def test_a_model_without_a_start_token_is_refused_by_name(lm, tokenizer, rows):
    bare = replace(tokenizer, start_id=None)
    with pytest.raises(ValueError, match="model tiny has neither BOS nor EOS"):
        score(lm, bare, rows, 100)


def test_a_row_that_is_not_finite_is_named(lm, tokenizer, rows):
    with torch.no_grad():
        broken = replace(lm, head=torch.nn.Linear(32, lm.head.out_features, bias=False))
        broken.head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"model tiny gives row 'd0#0' .* \(5 of 5 rows\)"):
        score(broken, tokenizer, rows, 100)


def test_the_rows_of_a_document_add_up(rows):
    nats = np.arange(5, dtype=np.float64)
    first = rows["num_bytes"][0].as_py()
    assert score_documents(rows, nats)[:2] == [
        DocumentScore("d0", "prose", first + 1, 1.0),
        DocumentScore("d1", "code", 27, 2.0),
    ]


def test_a_document_is_its_rows_up_to_its_last_whatever_the_ids_are():
    rows = pa.table(
        {
            "doc_id": ["a", "a", "a", "b"],
            "domain": ["wiki"] * 4,
            "num_bytes": [10, 20, 5, 1],
            "ends_document": [False, True, True, True],
        }
    )
    assert score_documents(rows, np.array([1.0, 3.0, 2.0, 4.0])) == [
        DocumentScore("a", "wiki", 30, 4.0),
        DocumentScore("a", "wiki", 5, 2.0),
        DocumentScore("b", "wiki", 1, 4.0),
    ]
    np.testing.assert_array_equal(number_documents(rows), [0, 0, 1, 2])


def test_a_story_model_needs_fewer_bits_for_a_story_than_for_code(rows, shared_data: Path):
    folder = str(shared_data / "models" / "stories260k")
    lm = load_scored_model(ModelSettings(model=folder, dtype="float32"))
    texts = ["Once upon a time, there was a little girl named Lily.", "x = {k: v[1:] for k in z}"]
    table = rows.slice(0, 2).set_column(3, "text", pa.array(texts))
    nats = score_rows(lm, load_tokenizer(folder), table, name="stories", batch_tokens=100)
    story, code = (n / math.log(2) / len(text) for n, text in zip(nats, texts, strict=True))
    assert story < 1 < code
