from itertools import pairwise

import numpy as np
import pytest

from rayfuse.recipe import TrainSettings
from rayfuse.train.engine import learning_rate_share
from rayfuse.train.order import count_steps, order_rows, rows_of_step, share_of_worker

SHARDS = [5, 0, 7, 3] * 6


def test_every_row_comes_once_an_epoch_in_an_order_of_seed_and_epoch():
    order = order_rows(SHARDS, seed=1, epoch=0)
    expected = {(shard, row) for shard, rows in enumerate(SHARDS) for row in range(rows)}
    assert len(order) == len(expected)
    assert set(map(tuple, order.tolist())) == expected
    np.testing.assert_array_equal(order, order_rows(SHARDS, seed=1, epoch=0))
    assert order.tolist() != order_rows(SHARDS, seed=1, epoch=1).tolist()
    assert order.tolist() != order_rows(SHARDS, seed=2, epoch=0).tolist()


def test_a_window_never_needs_more_shards_than_are_kept_open():
    order = order_rows(SHARDS, seed=3, epoch=0)[:, 0].tolist()
    runs = [(order.index(shard), len(order) - order[::-1].index(shard)) for shard in set(order)]
    for start in range(len(order)):
        assert sum(first <= start < last for first, last in runs) <= 8


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_any_number_of_workers_shares_out_the_same_steps(num_workers):
    order = order_rows(SHARDS, seed=4, epoch=0)
    steps = count_steps(len(order), 8, 1)
    for step in range(steps):
        rows = rows_of_step(order, step, 8)
        shares = [share_of_worker(rows, rank, num_workers, 8) for rank in range(num_workers)]
        np.testing.assert_array_equal(np.concatenate(shares), rows)
    assert len(rows_of_step(order, steps - 1, 8)) > 0


def test_the_learning_rate_warms_up_then_falls_by_a_cosine():
    settings = TrainSettings(warmup_share=0.1, final_learning_rate_share=0.2)
    shares = [learning_rate_share(step, settings, 100) for step in range(100)]
    np.testing.assert_allclose(shares[:10], np.arange(1, 11) / 10)
    assert shares[10] == 1.0
    assert all(a >= b for a, b in pairwise(shares[10:]))
    np.testing.assert_allclose(learning_rate_share(100, settings, 100), 0.2)
    np.testing.assert_allclose(learning_rate_share(55, settings, 100), 0.6)
