import math
import re
from itertools import pairwise

import numpy as np
import pytest

from rayfuse.config.train import Ramp, TrainSettings, value_at
from rayfuse.train.deepspeed_engine import learning_rate_share
from rayfuse.train.order import (
    ENOUGH_STEPS,
    SHUFFLE_STREAMS,
    advise_steps,
    count_steps,
    draw_rows,
    order_rows,
)

SHARDS = [5, 0, 7, 3] * 6


def test_every_row_comes_once_an_epoch_in_an_order_of_seed_and_epoch():
    order = order_rows(SHARDS, seed=1, epoch=0).rows
    expected = {(shard, row) for shard, rows in enumerate(SHARDS) for row in range(rows)}
    assert len(order) == len(expected)
    assert set(map(tuple, order.tolist())) == expected
    np.testing.assert_array_equal(order, order_rows(SHARDS, seed=1, epoch=0).rows)
    assert order.tolist() != order_rows(SHARDS, seed=1, epoch=1).rows.tolist()
    assert order.tolist() != order_rows(SHARDS, seed=2, epoch=0).rows.tolist()


def test_few_shards_are_needed_at_a_time():
    order = order_rows(SHARDS, seed=3, epoch=0).rows[:, 0].tolist()
    runs = [(order.index(shard), len(order) - order[::-1].index(shard)) for shard in set(order)]
    for start in range(len(order)):
        assert sum(first <= start < last for first, last in runs) <= SHUFFLE_STREAMS


def test_all_shuffle_streams_end_together():
    order = order_rows([50, 3, 40, 41, 39, 44, 60, 20, 10, 33] * 3, seed=3, epoch=0)
    tenth = order.streams[-len(order.streams) // 10 :]
    assert set(tenth.tolist()) == set(range(SHUFFLE_STREAMS))


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4, 8])
def test_any_number_of_workers_shares_out_the_same_steps(num_workers):
    order = order_rows(SHARDS, seed=4, epoch=0)
    for number in range(count_steps(len(order.rows), 8, 1)):
        step = order.step(number, 8)
        shares = [step.share(rank, num_workers) for rank in range(num_workers)]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        dealt = sorted(map(tuple, np.concatenate(shares).tolist()))
        assert dealt == sorted(map(tuple, step.rows.tolist()))


def test_a_worker_of_many_reads_few_of_the_shards():
    order = order_rows([40] * 32, seed=5, epoch=0)
    steps = [order.step(number, 16) for number in range(80)]
    mine = {int(shard) for step in steps for shard in step.share(3, 8)[:, 0]}
    assert len(mine) <= 12  # of 32; 4 of its stream, and those it shares with its neighbours'


@pytest.mark.parametrize("count", [0, 1, 9, 90, 1000])
def test_rows_are_drawn_each_once_and_from_all_shards_alike(count):
    drawn = draw_rows(SHARDS, count, seed=0).tolist()
    assert len(drawn) == min(count, sum(SHARDS))
    assert len(set(map(tuple, drawn))) == len(drawn)
    assert all(0 <= row < SHARDS[shard] for shard, row in drawn)
    assert drawn == draw_rows(SHARDS, count, seed=0).tolist()
    assert len(draw_rows([], count, seed=0)) == 0


def test_the_learning_rate_warms_up_then_falls_by_a_cosine():
    settings = TrainSettings(warmup_share=0.1, final_learning_rate_share=0.2)
    shares = [learning_rate_share(step, settings, 100) for step in range(100)]
    np.testing.assert_allclose(shares[:10], np.arange(1, 11) / 10)
    assert shares[10] == 1.0
    assert all(a >= b for a, b in pairwise(shares[10:]))
    np.testing.assert_allclose(learning_rate_share(100, settings, 100), 0.2)
    np.testing.assert_allclose(learning_rate_share(55, settings, 100), 0.6)


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.6), ("constant", 1.0)])
def test_other_schedules_go_their_way(schedule, middle):
    settings = TrainSettings(warmup_share=0.0, final_learning_rate_share=0.2, schedule=schedule)
    assert learning_rate_share(0, settings, 100) == 1.0
    np.testing.assert_allclose(learning_rate_share(50, settings, 100), middle)


def test_a_ramp_goes_from_its_start_to_its_end():
    linear, cosine = (Ramp(start=0.9, end=0.1, shape=shape) for shape in ("linear", "cosine"))
    assert [value_at(linear, done) for done in (0.0, 1.0)] == pytest.approx([0.9, 0.1])
    assert value_at(linear, 0.25) == pytest.approx(0.7)
    assert value_at(cosine, 0.25) == pytest.approx(0.9 - 0.8 * (1 - math.cos(math.pi / 4)) / 2)
    assert value_at(0.3, 0.7) == 0.3


@pytest.mark.parametrize(
    ("num_rows", "rows_per_step", "epochs"),
    [
        (230, 128, 1),
        (230, 128, 8),
        (40, 128, 1),
        (40, 8, 1),
        (3, 128, 2),
        (5000, 128, 1),
        (40, 1, 1),
    ],
)
def test_advice_on_few_steps_gives_enough_of_them(num_rows, rows_per_step, epochs):
    advice = advise_steps(num_rows, rows_per_step, epochs)
    assert advice is not None
    wanted = dict(re.findall(r"train\.(\w+) to (\d+)", advice))
    settings = {"rows_per_step": rows_per_step, "epochs": epochs}
    settings |= {name: int(value) for name, value in wanted.items()}
    assert count_steps(num_rows, **settings) >= ENOUGH_STEPS
    assert advise_steps(num_rows, **settings) is None


def test_no_advice_where_steps_are_enough_or_unknown():
    assert advise_steps(12_800, 128, 1) is None
    assert advise_steps(0, 128, 1) is None
