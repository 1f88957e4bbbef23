"""Which rows each step trains on: a function of seed and epoch alone, never of the workers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

SHUFFLE_STREAMS = 8
"""Shards that rows are drawn from at a time: so many are open, not the whole corpus."""


@dataclass(frozen=True)
class Order:
    """Every row of an epoch once."""

    rows: Int[np.ndarray, "rows 2"]
    """(shard, row in shard)."""
    lanes: Int[np.ndarray, " rows"]
    """Which lane each comes from: a lane opens its shards one after the other."""

    def step(self, step: int, rows_per_step: int) -> "Order":
        """Return the rows of a step of the epoch, over all workers."""
        part = slice(step * rows_per_step, (step + 1) * rows_per_step)
        return Order(self.rows[part], self.lanes[part])

    def share(self, rank: int, num_workers: int) -> Int[np.ndarray, "worker_rows 2"]:
        """Return one worker's rows of a step: those of its lanes, as far as shares are equal."""
        by_lane = self.rows[np.argsort(self.lanes, kind="stable")]
        return np.array_split(by_lane, num_workers)[rank]


def order_rows(rows_per_shard: Sequence[int], *, seed: int, epoch: int) -> Order:
    """Return an epoch's order.

    Shards are shuffled and dealt to `SHUFFLE_STREAMS` lanes; the rows of each shard are shuffled.
    All lanes begin and end together: a row's place is its share of the way through its lane.
    """
    random = np.random.default_rng([seed, epoch])
    shards = random.permutation(len(rows_per_shard))
    num_lanes = max(1, min(SHUFFLE_STREAMS, len(shards)))
    rows: list[np.ndarray] = [np.zeros((0, 2), dtype=np.int64)]
    lanes: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    places: list[np.ndarray] = [np.zeros(0)]
    for lane in range(num_lanes):
        mine = [
            np.stack([np.full(num_rows, shard), random.permutation(num_rows)], axis=1)
            for shard in shards[lane::num_lanes]
            if (num_rows := rows_per_shard[shard])
        ]
        num_rows = sum(map(len, mine))
        rows += mine
        lanes.append(np.full(num_rows, lane))
        places.append((np.arange(num_rows) + random.random()) / max(num_rows, 1))
    order = np.argsort(np.concatenate(places), kind="stable")
    return Order(np.concatenate(rows)[order], np.concatenate(lanes)[order])


def draw_rows(rows_per_shard: Sequence[int], count: int, *, seed: int) -> Int[np.ndarray, "rows 2"]:
    """Return some rows of all, each once, as (shard, row in shard); all if there are fewer."""
    ends = np.cumsum(np.asarray(rows_per_shard, dtype=np.int64))
    total = int(ends[-1]) if len(ends) else 0
    chosen = np.random.default_rng(seed).choice(total, min(count, total), replace=False)
    shards = np.searchsorted(ends, chosen, side="right")
    starts = ends - np.asarray(rows_per_shard, dtype=np.int64)
    return np.stack([shards, chosen - starts[shards]], axis=1)


def count_steps(num_rows: int, rows_per_step: int, epochs: int) -> int:
    """Return the optimiser steps of a run; the last of each epoch may have fewer rows."""
    return epochs * -(-num_rows // rows_per_step)
