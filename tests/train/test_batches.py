"""FusedRows -> sequences -> micro-batches, and back again."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rayfuse.config.train import TrainSettings
from rayfuse.fuse.reader import FusedRows, join_rows
from rayfuse.fuse.rules import make_empty
from rayfuse.models.causal_lm import split_head
from rayfuse.storage.codec import TopK
from rayfuse.train.batches import Packing, build_micro_batches, empty_micro_batch, pack_rows
from rayfuse.train.loss import LossWeights
from rayfuse.train.model import FusionModel
from tests.models.tiny_models import tiny_config

VOCAB, ENTRIES = 61, 3


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(20, 60))
def test_every_row_is_in_one_sequence_and_none_is_too_long(lengths, capacity):
    sequences = pack_rows(lengths, capacity)
    assert sorted(row for sequence in sequences for row in sequence) == list(range(len(lengths)))
    for sequence in sequences:
        assert sum(lengths[row] for row in sequence) <= capacity or len(sequence) == 1
    half_full = sum(2 * sum(lengths[row] for row in sequence) <= capacity for sequence in sequences)
    assert half_full <= 1  # else two of them would have become one


def random_rows(num_rows: int, seed: int = 0) -> FusedRows:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 20, size=num_rows)
    total = int(lengths.sum())
    ids = np.stack([random.permutation(VOCAB)[:ENTRIES] for _ in range(total)]).astype(np.int32)
    probs = random.dirichlet(np.ones(ENTRIES + 1), size=total)
    has_signal = random.random(total) < 0.6
    selected = np.where(has_signal, random.integers(2, size=total), -1)
    top = TopK(ids, probs[:, :ENTRIES], probs[:, ENTRIES])
    return FusedRows(random.integers(0, VOCAB, total).astype(np.int32), lengths, top, selected)


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("sequences", [1, 3])
def test_micro_batches_hold_each_position_once_with_its_targets(is_packed, sequences):
    rows = random_rows(17)
    batches = build_micro_batches(rows, Packing(32, sequences, is_packed))
    found = []
    for batch in batches:
        assert len(batch.token_ids) <= sequences
        flat = batch.token_ids.reshape(-1)
        np.testing.assert_array_equal(flat[batch.positions + 1], batch.next_ids)
        for at, following, tail in zip(
            batch.positions, batch.next_ids, batch.top.tail, strict=True
        ):
            found.append((int(flat[at]), int(following), float(tail)))
    expected = []
    ends = np.cumsum(rows.lengths)
    for start, end in zip(ends - rows.lengths, ends, strict=True):
        for at in range(start, end - 1):
            pair = int(rows.token_ids[at]), int(rows.token_ids[at + 1])
            expected.append((*pair, float(rows.top.tail[at])))
    assert sorted(found) == sorted(expected)


def make_model(family: str) -> FusionModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, VOCAB))
    lm = split_head(model.eval(), name=family)
    return FusionModel(lm, TrainSettings(chunk_positions=7), num_sources=2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packing_changes_neither_the_loss_nor_its_gradients(family):
    rows = random_rows(9)
    weights = LossWeights(scale=0.01, clm=0.4)
    results = []
    for packing in (Packing(64, 2, True), Packing(64, 1, False)):
        model = make_model(family)
        loss = torch.stack([model(b, weights)[0] for b in build_micro_batches(rows, packing)]).sum()
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0])
    for packed, alone in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-6)


def test_lambda_1_and_sources_without_a_word_are_plain_language_modelling_to_the_bit():
    rows = random_rows(9)
    selected = np.full(len(rows.token_ids), -1, dtype=np.int16)
    silent = replace(rows, top=make_empty(len(rows.token_ids)), selected=selected)
    results = []
    for given_rows, clm_weight in ((rows, 1.0), (silent, 0.3), (silent, 1.0)):
        model = make_model("llama")
        batches = build_micro_batches(given_rows, Packing(64, 2, True))
        loss = torch.stack([model(b, LossWeights(0.01, clm_weight))[0] for b in batches]).sum()
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters()]))
    for loss, grads in results[:2]:
        assert loss == results[2][0]
        assert all(map(torch.equal, grads, results[2][1]))


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_worker_without_rows_learns_nothing(is_packed):
    (batch,) = build_micro_batches(random_rows(1), Packing(64, 1, is_packed))
    assert build_micro_batches(join_rows([]), Packing(64, 1, is_packed)) == []
    for like in (None, batch):
        model = make_model("llama")
        loss, sums = model(empty_micro_batch(like), LossWeights(0.1, 0.5))
        loss.backward()
        assert loss == 0
        assert not sums.any()
        assert not any(p.grad is not None and p.grad.any() for p in model.parameters())
