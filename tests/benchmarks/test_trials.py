"""The changes that are tried in regime R1 do what their names say."""

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from benchmarks.fusion.regime_plan import plan_regime
from benchmarks.fusion.trials import MovingAverage, Span, add_noise, cut_anew, mix_with_copy
from rayfuse.fuse.reader import FusedRows
from rayfuse.storage.codec import TopK


def make_rows(ids: list[list[int]], probs: list[list[float]], selected: list[int]) -> FusedRows:
    top = TopK(
        np.array(ids, np.int32),
        np.array(probs, np.float32),
        np.float32(1) * (np.array(selected) >= 0) - np.array(probs, np.float32).sum(axis=1),
    )
    length = np.array([len(selected)])
    return FusedRows(np.arange(len(selected), dtype=np.int32), length, top, np.int16(selected))


def test_a_copy_has_its_share_and_stands_alone_where_the_sources_are_silent():
    rows = make_rows([[1, 2], [-1, -1], [1, 2]], [[0.5, 0.25], [0, 0], [0.5, 0.25]], [1, -1, 0])
    copy = make_rows([[2, 3], [2, 3], [-1, -1]], [[0.5, 0.5], [0.5, 0.5], [0, 0]], [0, 0, -1])
    mixed = mix_with_copy(rows, copy, 0.2)
    assert mixed.selected.tolist() == [1, 0, 0]
    found = [
        {int(i): float(p) for i, p in zip(ids, probs, strict=True) if i >= 0}
        for ids, probs in zip(mixed.top.ids, mixed.top.probs, strict=True)
    ]
    np.testing.assert_allclose([found[0][i] for i in (1, 2, 3)], [0.4, 0.3, 0.1], rtol=1e-6)
    np.testing.assert_allclose([found[1][i] for i in (2, 3)], [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose([found[2][i] for i in (1, 2)], [0.5, 0.25], rtol=1e-6)
    np.testing.assert_allclose(mixed.top.tail, [0.2, 0.0, 0.25], atol=1e-6)


def test_documents_are_cut_at_other_places_and_every_row_begins_with_a_start_token():
    lengths = np.array([10, 10, 4, 7, 10, 3])
    stops = np.cumsum(lengths)
    rows = [Span(at, at) for at in map(np.arange, (stops - lengths).tolist(), stops.tolist())]
    starts = set((stops - lengths).tolist())
    ends = np.array([False, False, True, True, False, True])
    first_rows = {0, 24, 31}
    seen = set()
    for seed in range(20):
        spans = cut_anew(rows, ends, np.random.default_rng(seed))
        seen.add(tuple(len(span.tokens) for span in spans))
        assert {int(span.tokens[0]) for span in spans} == first_rows
        words = np.concatenate([span.tokens[1:] for span in spans]).tolist()
        assert sorted(words) == sorted(set(range(44)) - starts)  # each once, no start token
        for span in spans:
            assert len(span.tokens) == len(span.tops) <= 10
            for word, at in zip(span.tokens[1:], span.tops[:-1], strict=True):
                assert word == at + 1  # the stored distribution that predicts the word
    assert len(seen) > 5


def test_noise_replaces_a_share_of_the_tokens_but_no_first_one():
    ids = np.zeros((50, 40), dtype=np.int32)
    rows = make_rows([[1]] * 2, [[1.0]] * 2, [0, 0])
    rows = replace(rows, token_ids=np.array([7, 8], np.int32))
    noisy = add_noise(ids, rows, 0.25, np.random.default_rng(0))
    assert set(np.unique(noisy)) == {0, 7, 8} and not noisy[:, 0].any()
    assert abs((noisy[:, 1:] > 0).mean() - 0.25) < 0.03
    assert noisy.dtype == ids.dtype


def test_the_average_of_constant_weights_is_the_weights_and_follows_a_change():
    model = nn.Linear(2, 1)
    average = MovingAverage(model, 0.5)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1.0
    for _ in range(50):
        average.update()
    with torch.no_grad():
        model.weight += 1.0
    average.update()
    average.replace_weights()
    torch.testing.assert_close(model.weight.detach(), before + 1.5)


def test_every_unit_of_a_regime_has_a_key_of_its_own_but_equal_ones():
    for name in ("R0", "R1", "R2", "R3", "R4"):
        for role, variants in plan_regime(name, 2).items():
            keys = [unit.key for unit in variants.values()]
            assert len(set(keys)) == len(keys), (name, role)
