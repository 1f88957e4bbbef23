"""Which rows each step trains on: a function of seed and epoch alone, never of the workers."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

WINDOW_SHARDS = 8
"""Shards whose rows are shuffled together: a worker keeps this many open, not the whole corpus."""


def order_rows(
    rows_per_shard: Sequence[int], *, seed: int, epoch: int
) -> Int[np.ndarray, "rows 2"]:
    """Return every row of the corpus once, as (shard, row in shard), shuffled.

    Shards come in random order; within windows of `WINDOW_SHARDS` of them, so do rows.
    """
    random = np.random.default_rng([seed, epoch])
    shards = random.permutation(len(rows_per_shard))
    windows: list[np.ndarray] = [np.zeros((0, 2), dtype=np.int64)]
    for start in range(0, len(shards), WINDOW_SHARDS):
        window = np.concatenate(
            [
                np.stack(
                    [np.full(rows_per_shard[shard], shard), np.arange(rows_per_shard[shard])], 1
                )
                for shard in shards[start : start + WINDOW_SHARDS]
            ]
        )
        windows.append(random.permutation(window))
    return np.concatenate(windows)


def count_steps(num_rows: int, rows_per_step: int, epochs: int) -> int:
    """Return the optimiser steps of a run; the last of each epoch may have fewer rows."""
    return epochs * -(-num_rows // rows_per_step)


def rows_of_step(
    order: Int[np.ndarray, "rows 2"], step: int, rows_per_step: int
) -> Int[np.ndarray, "step_rows 2"]:
    """Return the rows of a step of an epoch, over all workers."""
    return order[step * rows_per_step : (step + 1) * rows_per_step]


def share_of_worker(
    rows: Int[np.ndarray, "step_rows 2"], rank: int, num_workers: int, rows_per_step: int
) -> Int[np.ndarray, "worker_rows 2"]:
    """Return one worker's rows of a step: its slots, fewer where the step is short."""
    slots = rows_per_step // num_workers
    return rows[rank * slots : (rank + 1) * slots]
