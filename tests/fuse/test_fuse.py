from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfuse.config.fuse import FuseSettings
from rayfuse.fuse.rules import AlignedRow, FusedRow, fuse_row

MIN_CE, AVG_CE = FuseSettings(method="min_ce"), FuseSettings(method="avg_ce")


def random_source(seed: int, nats_per_byte: float, seq_len: int = 7) -> AlignedRow:
    random = np.random.default_rng(seed)
    probs = random.dirichlet(np.ones(4), size=seq_len)
    return AlignedRow(
        has_signal=random.random(seq_len) < 0.7,
        top_ids=np.stack([random.permutation(6)[:3] for _ in range(seq_len)]).astype(np.int32),
        top_probs=probs[:, :3],
        tail_probs=probs[:, 3],
        costs=np.full(seq_len, nats_per_byte),
    )


def dense(row: FusedRow, position: int) -> dict[int, float]:
    pairs = zip(row.top_ids[position], row.top_probs[position], strict=True)
    return {int(token): float(p) for token, p in pairs if token >= 0}


def test_min_ce_takes_the_cheapest_source_where_it_has_a_signal_and_the_next_where_not():
    dear, cheap = random_source(1, 0.9), random_source(2, 0.5)
    fused = fuse_row([dear, cheap], MIN_CE)
    for t in range(7):
        source = cheap if cheap.has_signal[t] else dear
        assert fused.has_signal[t] == (cheap.has_signal[t] or dear.has_signal[t])
        if fused.has_signal[t]:
            np.testing.assert_array_equal(fused.top_probs[t], source.top_probs[t])
            assert fused.tail_probs[t] == source.tail_probs[t]


def test_avg_ce_is_the_mean_weighted_by_softmax_of_minus_nats_per_byte():
    left, right = random_source(3, 0.4), random_source(4, 0.9)
    fused = fuse_row([left, right], AVG_CE)
    both = left.has_signal & right.has_signal
    assert both.any()
    weights = np.exp([-0.4, -0.9]) / np.exp([-0.4, -0.9]).sum()
    for t in np.flatnonzero(both):
        expected: dict[int, float] = {}
        for weight, source in zip(weights, (left, right), strict=True):
            for token, p in zip(source.top_ids[t], source.top_probs[t], strict=True):
                expected[int(token)] = expected.get(int(token), 0.0) + weight * p
        assert dense(fused, t) == pytest.approx(expected)


@given(seed=st.integers(0, 1000))
def test_fused_distributions_sum_to_one_and_hold_no_token_twice(seed):
    sources = [random_source(seed + i, 0.1 + 0.2 * i) for i in range(3)]
    for settings in (MIN_CE, AVG_CE):
        fused = fuse_row(sources, settings)
        for t in np.flatnonzero(fused.has_signal):
            ids = fused.top_ids[t][fused.top_ids[t] >= 0].tolist()
            assert len(ids) == len(set(ids))
            assert fused.top_probs[t].sum() + fused.tail_probs[t] == pytest.approx(1.0)


@pytest.mark.parametrize("settings", [MIN_CE, AVG_CE])
def test_a_rejected_source_changes_nothing(settings):
    good, bad = random_source(5, 0.5), random_source(6, float("inf"))
    silent = replace(bad, has_signal=np.zeros(7, dtype=bool))
    alone, beside = fuse_row([good], settings), fuse_row([silent, good], settings)
    np.testing.assert_array_equal(alone.has_signal, beside.has_signal)
    for t in np.flatnonzero(alone.has_signal):
        assert dense(alone, t) == dense(beside, t)
        assert alone.tail_probs[t] == beside.tail_probs[t]


@pytest.mark.parametrize("settings", [MIN_CE, AVG_CE])
def test_a_source_of_infinite_cost_is_not_heard_even_where_it_has_a_signal(settings):
    """One that leaves out a whole row has a signal at its end, and no tokens to divide by."""
    good, dear = random_source(16, 0.5), random_source(17, float("inf"))
    assert (dear.has_signal & ~good.has_signal).any()
    alone = fuse_row([good], settings)
    for sources in ([good, dear], [dear, good]):
        beside = fuse_row(sources, settings)
        np.testing.assert_array_equal(alone.has_signal, beside.has_signal)
        np.testing.assert_array_equal(good.has_signal, beside.has_signal)
        for t in np.flatnonzero(alone.has_signal):
            assert dense(alone, t) == dense(beside, t)
    for sources in ([dear], [dear, replace(dear, top_ids=dear.top_ids + 1)]):
        fused = fuse_row(sources, settings)
        assert not fused.has_signal.any()
        assert np.isfinite(fused.top_probs).all() and np.isfinite(fused.tail_probs).all()


def test_a_colder_temperature_trusts_the_cheaper_source_more():
    sources = [random_source(7, 0.4), random_source(8, 0.6)]
    t = int(np.flatnonzero(sources[0].has_signal & sources[1].has_signal)[0])
    tails = [
        fuse_row(sources, FuseSettings(method="avg_ce", temperature=heat)).tail_probs[t]
        for heat in (100.0, 1.0, 0.01)
    ]
    near = sources[0].tail_probs[t]
    assert abs(tails[2] - near) < abs(tails[1] - near) < abs(tails[0] - near)


@pytest.mark.parametrize("settings", [MIN_CE, AVG_CE])
def test_a_source_of_weight_0_changes_nothing_to_the_bit(settings):
    heard, unheard = random_source(9, 0.5), replace(random_source(10, 0.1), weight=0.0)
    alone, beside = fuse_row([heard], settings), fuse_row([unheard, heard], settings)
    for name in ("has_signal", "top_ids", "top_probs", "tail_probs"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(beside, name))


def test_a_weight_multiplies_a_sources_share_of_the_mean():
    sources = [random_source(11, 0.5), replace(random_source(12, 0.5), weight=3.0)]
    fused = fuse_row(sources, AVG_CE)
    both = np.flatnonzero(sources[0].has_signal & sources[1].has_signal)
    expected = 0.25 * sources[0].tail_probs + 0.75 * sources[1].tail_probs
    np.testing.assert_allclose(fused.tail_probs[both], expected[both])


@pytest.mark.parametrize("settings", [MIN_CE, AVG_CE])
def test_a_choice_may_differ_from_position_to_position(settings):
    left, right = (
        replace(random_source(seed, 0.0), has_signal=np.ones(7, dtype=bool)) for seed in (13, 14)
    )
    left = replace(left, costs=np.array([0.1, 9, 9, 0.1, 9, 0.1, 0.1]))
    right = replace(right, costs=np.array([9, 0.1, 0.1, 9, 0.1, 9, 9]))
    fused = fuse_row([left, right], settings)
    for t in range(7):
        cheap = left if left.costs[t] < right.costs[t] else right
        assert fused.tail_probs[t] == pytest.approx(cheap.tail_probs[t], abs=1e-3)


def test_renormalising_leaves_the_tail_out_and_scales_the_head_to_one():
    source = random_source(15, 0.5)
    fused = fuse_row([source], FuseSettings(tail="renormalise"))
    np.testing.assert_array_equal(fused.has_signal, source.has_signal)
    head = source.top_probs / source.top_probs.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(fused.top_probs[source.has_signal], head[source.has_signal])
    assert not fused.tail_probs.any()
