from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfuse.config.fuse import FuseSettings
from rayfuse.storage.codec import TopK
from tests.fuse.oracle import AlignedSource, FusedSources, fuse_sources

MIN_CE, AVG_CE = FuseSettings(method="min_ce"), FuseSettings(method="avg_ce")


def random_source(seed: int, nll: float, seq_len: int = 7) -> AlignedSource:
    random = np.random.default_rng(seed)
    probs = random.dirichlet(np.ones(4), size=seq_len)
    has_signal = random.random(seq_len) < 0.7
    ids = np.stack([random.permutation(6)[:3] for _ in range(seq_len)]).astype(np.int32)
    top = TopK(ids, probs[:, :3], probs[:, 3])
    return AlignedSource(has_signal, top, np.full(seq_len, nll))


def dense(fused: FusedSources, position: int) -> dict[int, float]:
    pairs = zip(fused.top.ids[position], fused.top.probs[position], strict=True)
    return {int(token): float(p) for token, p in pairs if token >= 0}


def test_min_ce_selects_the_lowest_nll_among_sources_with_a_signal():
    high, low = random_source(1, 0.9), random_source(2, 0.5)
    fused = fuse_sources([high, low], MIN_CE)
    for t in range(7):
        source = low if low.has_signal[t] else high
        assert fused.has_signal[t] == (low.has_signal[t] or high.has_signal[t])
        if fused.has_signal[t]:
            np.testing.assert_array_equal(fused.top.probs[t], source.top.probs[t])
            assert fused.top.tail[t] == source.top.tail[t]


def test_avg_ce_is_the_mean_weighted_by_softmax_of_minus_nll():
    left, right = random_source(3, 0.4), random_source(4, 0.9)
    fused = fuse_sources([left, right], AVG_CE)
    both = left.has_signal & right.has_signal
    assert both.any()
    weights = np.exp([-0.4, -0.9]) / np.exp([-0.4, -0.9]).sum()
    for t in np.flatnonzero(both):
        expected: dict[int, float] = {}
        for weight, source in zip(weights, (left, right), strict=True):
            for token, p in zip(source.top.ids[t], source.top.probs[t], strict=True):
                expected[int(token)] = expected.get(int(token), 0.0) + weight * p
        assert dense(fused, t) == pytest.approx(expected)


@given(seed=st.integers(0, 1000))
def test_fused_distributions_sum_to_one_and_hold_no_token_twice(seed):
    sources = [random_source(seed + i, 0.1 + 0.2 * i) for i in range(3)]
    for settings in (MIN_CE, AVG_CE):
        fused = fuse_sources(sources, settings)
        for t in np.flatnonzero(fused.has_signal):
            ids = fused.top.ids[t][fused.top.ids[t] >= 0].tolist()
            assert len(ids) == len(set(ids))
            assert fused.top.probs[t].sum() + fused.top.tail[t] == pytest.approx(1.0)


@pytest.mark.parametrize("settings", [MIN_CE, AVG_CE])
def test_a_rejected_source_changes_nothing(settings):
    good, bad = random_source(5, 0.5), random_source(6, float("inf"))
    silent = replace(bad, has_signal=np.zeros(7, dtype=bool))
    alone, beside = fuse_sources([good], settings), fuse_sources([silent, good], settings)
    np.testing.assert_array_equal(alone.has_signal, beside.has_signal)
    for t in np.flatnonzero(alone.has_signal):
        assert dense(alone, t) == dense(beside, t)
        assert alone.top.tail[t] == beside.top.tail[t]


@pytest.mark.parametrize("settings", [MIN_CE, AVG_CE])
def test_a_source_of_infinite_nll_is_not_active_even_where_it_has_a_signal(settings):
    """A source that drops all text of a row has a signal at its end, and no tokens to divide by."""
    good, high = random_source(16, 0.5), random_source(17, float("inf"))
    assert (high.has_signal & ~good.has_signal).any()
    alone = fuse_sources([good], settings)
    for sources in ([good, high], [high, good]):
        beside = fuse_sources(sources, settings)
        np.testing.assert_array_equal(alone.has_signal, beside.has_signal)
        np.testing.assert_array_equal(good.has_signal, beside.has_signal)
        for t in np.flatnonzero(alone.has_signal):
            assert dense(alone, t) == dense(beside, t)
    for sources in ([high], [high, replace(high, top=replace(high.top, ids=high.top.ids + 1))]):
        fused = fuse_sources(sources, settings)
        assert not fused.has_signal.any()
        assert np.isfinite(fused.top.probs).all() and np.isfinite(fused.top.tail).all()


def test_a_lower_temperature_gives_the_source_of_lower_nll_more_weight():
    sources = [random_source(7, 0.4), random_source(8, 0.6)]
    t = int(np.flatnonzero(sources[0].has_signal & sources[1].has_signal)[0])
    tails = [
        fuse_sources(sources, FuseSettings(method="avg_ce", temperature=heat)).top.tail[t]
        for heat in (100.0, 1.0, 0.01)
    ]
    near = sources[0].top.tail[t]
    assert abs(tails[2] - near) < abs(tails[1] - near) < abs(tails[0] - near)


@pytest.mark.parametrize("settings", [MIN_CE, AVG_CE])
def test_a_source_of_weight_0_leaves_the_result_bit_identical(settings):
    active, unused = random_source(9, 0.5), replace(random_source(10, 0.1), weight=0.0)
    alone, beside = fuse_sources([active], settings), fuse_sources([unused, active], settings)
    np.testing.assert_array_equal(alone.has_signal, beside.has_signal)
    for name in ("ids", "probs", "tail"):
        np.testing.assert_array_equal(getattr(alone.top, name), getattr(beside.top, name))


def test_a_weight_multiplies_a_sources_share_of_the_mean():
    sources = [random_source(11, 0.5), replace(random_source(12, 0.5), weight=3.0)]
    fused = fuse_sources(sources, AVG_CE)
    both = np.flatnonzero(sources[0].has_signal & sources[1].has_signal)
    expected = 0.25 * sources[0].top.tail + 0.75 * sources[1].top.tail
    np.testing.assert_allclose(fused.top.tail[both], expected[both])


@pytest.mark.parametrize("settings", [MIN_CE, AVG_CE])
def test_a_choice_may_differ_from_position_to_position(settings):
    left, right = (
        replace(random_source(seed, 0.0), has_signal=np.ones(7, dtype=bool)) for seed in (13, 14)
    )
    left = replace(left, nll=np.array([0.1, 9, 9, 0.1, 9, 0.1, 0.1]))
    right = replace(right, nll=np.array([9, 0.1, 0.1, 9, 0.1, 9, 9]))
    fused = fuse_sources([left, right], settings)
    for t in range(7):
        low = left if left.nll[t] < right.nll[t] else right
        assert fused.top.tail[t] == pytest.approx(low.top.tail[t], abs=1e-3)


def test_renormalising_drops_the_tail_and_scales_the_head_to_one():
    source = random_source(15, 0.5)
    fused = fuse_sources([source], FuseSettings(tail="renormalise"))
    np.testing.assert_array_equal(fused.has_signal, source.has_signal)
    head = source.top.probs / source.top.probs.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(fused.top.probs[source.has_signal], head[source.has_signal])
    assert not fused.top.tail.any()
