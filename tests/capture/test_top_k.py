from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from rayfuse.capture.engines.transformers_engine import TransformersEngine
from rayfuse.capture.rows import NOT_FINITE, build_captured, tokenize_rows
from rayfuse.capture.top_k import TopLogprobs, keep_top_k
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import ModelSettings
from rayfuse.corpus.documents import Document
from rayfuse.corpus.shards import build_rows
from rayfuse.models.causal_lm import CausalLM
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.schema import CORPUS
from rayfuse.storage.codec import decode_probs, flatten_column
from tests.fakes import SAMPLE, byte_level_tokenizer, save_model, save_tokenizer

VOCAB, PADDED = 300, 320


def make_source(family: str, folder: Path) -> ModelSettings:
    """Save a model with a head wider than its tokenizer."""
    save_model(family, PADDED, folder)
    save_tokenizer(byte_level_tokenizer(VOCAB), folder, bos="<|end|>", eos="<|end|>")
    return ModelSettings(model=str(folder))


def test_neither_batches_nor_chunks_change_a_record(tmp_path):
    source = make_source("llama", tmp_path)
    rows = load_recipe_tokenizer(source).encode_rows(SAMPLE, [True] * len(SAMPLE))
    alone = TransformersEngine(source, CaptureSettings(top_k=4, batch_tokens=1, chunk_positions=3))
    together = TransformersEngine(source, CaptureSettings(top_k=4, batch_tokens=10_000))
    for one, other in zip(alone.score_rows(rows), together.score_rows(rows), strict=True):
        np.testing.assert_allclose(one.top_logprobs, other.top_logprobs, atol=1e-5)
        np.testing.assert_allclose(one.next_logprobs, other.next_logprobs, atol=1e-5)


def test_a_vocabulary_smaller_than_top_k_leaves_empty_entries():
    record = keep_top_k(
        torch.randn(3, 4),
        CausalLM(nn.Identity(), nn.Identity(), nn.Linear(4, 5)),
        torch.tensor([True, True, True, False, False]),
        torch.tensor([0, 1, -1]),
        torch.zeros(3, 0),
        top_k=8,
        chunk_positions=2,
    ).split_rows([3])[0]
    assert (record.top_ids[:, 3:] == -1).all()
    np.testing.assert_allclose(np.exp(record.top_logprobs[:, :3]).sum(axis=1), 1, atol=1e-6)


def test_a_row_that_is_not_finite_is_rejected_without_its_neighbours(tmp_path):
    source = make_source("llama", tmp_path)
    tokenizer = load_recipe_tokenizer(source)
    corpus = build_rows(
        [Document(f"d{i}", "", text) for i, text in enumerate(SAMPLE)],
        tokenizer,
        [tokenizer],
        max_tokens=512,
    )
    rows = tokenize_rows(corpus, tokenizer)
    engine = TransformersEngine(source, CaptureSettings(top_k=4))
    poison = set(rows[2].tolist()) - set(rows[0].tolist()) - set(rows[1].tolist())
    with torch.no_grad():
        engine.lm.model.get_input_embeddings().weight[min(poison)] = float("nan")
    records = engine.score_rows(rows)
    table, rejects = build_captured(corpus, rows, records, tokenizer.eos_id)
    rejected = {reject.name for reject in rejects}
    assert "d2#0" in rejected
    assert not {"d0#0", "d1#0"} & rejected
    assert {reject.reason for reject in rejects} == {NOT_FINITE}
    lengths = np.diff(flatten_column(table, "token_ids")[1])
    assert lengths[2] == 0
    assert lengths[0] == len(rows[0])
    assert np.isinf(table["nats"].to_pylist()[2])
    assert table["row_id"].to_pylist() == corpus["row_id"].to_pylist()


def test_captured_columns_decode_to_the_record(tmp_path):
    source = make_source("gpt2", tmp_path)
    tokenizer = load_recipe_tokenizer(source)
    documents = [Document(f"d{i}", "", text) for i, text in enumerate(SAMPLE)]
    corpus = build_rows(documents, tokenizer, [tokenizer], max_tokens=512)
    rows = tokenize_rows(corpus, tokenizer)
    records = TransformersEngine(source, CaptureSettings(top_k=6)).score_rows(rows)
    table, rejects = build_captured(corpus, rows, records, tokenizer.eos_id)
    assert not rejects
    np.testing.assert_array_equal(flatten_column(table, "token_ids")[0], np.concatenate(rows))
    top_ids = flatten_column(table, "top_ids")[0].reshape(-1, 6)
    np.testing.assert_array_equal(top_ids, np.concatenate([record.top_ids for record in records]))
    tails = flatten_column(table, "tail_logprobs")[0]
    stored = decode_probs(flatten_column(table, "top_logprobs")[0], top_ids, tails)
    exact = np.concatenate([record.top_logprobs for record in records])
    np.testing.assert_allclose(np.log(stored), exact, atol=0.1)
    np.testing.assert_allclose(stored.sum(1) + np.exp(tails.astype(float)), 1, atol=1e-6)
    divergence = (np.exp(exact) * (exact - np.log(stored))).sum(axis=1).mean()
    assert abs(divergence) < 1e-3
    for row, record, nats in zip(rows, records, table["nats"].to_pylist(), strict=True):
        assert row[-1] == tokenizer.eos_id
        assert nats == pytest.approx(-record.next_logprobs[:-2].sum(), rel=1e-5)


@pytest.mark.parametrize("ends", [True, False])
def test_a_last_token_that_is_eos_is_excluded_from_the_nats_only_where_a_document_ends(ends):
    schema = pa.schema([CORPUS.field("row_id"), CORPUS.field("ends_document")])
    corpus = pa.table({"row_id": ["d#0"], "ends_document": [ends]}, schema=schema)
    half = np.log(np.full((3, 1), 0.5))
    record = TopLogprobs(
        top_ids=np.zeros((3, 1), dtype=np.int32),
        top_logprobs=half,
        tail_logprobs=half[:, 0],
        next_logprobs=np.array([-1.0, -2.0, 0.0]),
        drawn_ids=np.zeros((3, 0), dtype=np.int32),
    )
    table, _ = build_captured(corpus, [np.array([0, 5, 2], dtype=np.int32)], [record], eos_id=2)
    assert table["nats"].to_pylist() == [1.0 if ends else 3.0]
