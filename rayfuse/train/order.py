"""The order of rows: a function of the seed and the epoch, never of the number of workers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

SHUFFLE_STREAMS = 8
"""Shards from which rows are drawn at a time: only these are open, not all of the corpus."""


@dataclass(frozen=True)
class Order:
    """Rows in the order in which they are trained on."""

    rows: Int[np.ndarray, "rows 2"]
    """(shard, row in shard); every row of an epoch once."""
    streams: Int[np.ndarray, " rows"]
    """The shuffle stream of each row; a stream reads its shards one after the other."""

    def step(self, step: int, rows_per_step: int) -> "Order":
        """Select the rows of one step of the epoch, over all workers."""
        part = slice(step * rows_per_step, (step + 1) * rows_per_step)
        return Order(self.rows[part], self.streams[part])

    def share(self, rank: int, num_workers: int) -> Int[np.ndarray, "worker_rows 2"]:
        """Select one worker's rows of a step.

        Shares have equal sizes (or differ by 1). A worker gets the rows of as few streams as
        that allows, so that it opens few of the shards.
        """
        by_stream = self.rows[np.argsort(self.streams, kind="stable")]
        return np.array_split(by_stream, num_workers)[rank]


def order_rows(rows_per_shard: Sequence[int], *, seed: int, epoch: int) -> Order:
    """Shuffle the rows of an epoch without opening more than `SHUFFLE_STREAMS` shards at a time.

    The shards are shuffled and dealt to the streams; the rows of each shard are shuffled. The
    streams are then merged by relative position, so that all start and end together: a row comes
    at the fraction of the epoch at which it stands in its stream.
    """
    random = np.random.default_rng([seed, epoch])
    shards = random.permutation(len(rows_per_shard))
    num_streams = max(1, min(SHUFFLE_STREAMS, len(shards)))
    rows: list[np.ndarray] = [np.zeros((0, 2), dtype=np.int64)]
    streams: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    fractions: list[np.ndarray] = [np.zeros(0)]
    for stream in range(num_streams):
        stream_rows = [
            np.stack([np.full(num_rows, shard), random.permutation(num_rows)], axis=1)
            for shard in shards[stream::num_streams]
            if (num_rows := rows_per_shard[shard])
        ]
        num_rows = sum(map(len, stream_rows))
        rows += stream_rows
        streams.append(np.full(num_rows, stream))
        # A random offset, else streams of equal length would always come in the same turn.
        fractions.append((np.arange(num_rows) + random.random()) / max(num_rows, 1))
    order = np.argsort(np.concatenate(fractions), kind="stable")
    return Order(np.concatenate(rows)[order], np.concatenate(streams)[order])


def draw_rows(rows_per_shard: Sequence[int], count: int, *, seed: int) -> Int[np.ndarray, "rows 2"]:
    """Draw distinct rows of all shards, as (shard, row in shard); all if there are fewer."""
    ends = np.cumsum(np.asarray(rows_per_shard, dtype=np.int64))
    total = int(ends[-1]) if len(ends) else 0
    chosen = np.random.default_rng(seed).choice(total, min(count, total), replace=False)
    shards = np.searchsorted(ends, chosen, side="right")
    starts = ends - np.asarray(rows_per_shard, dtype=np.int64)
    return np.stack([shards, chosen - starts[shards]], axis=1)


ENOUGH_STEPS = 100
"""With fewer optimizer steps a training has hardly left its start: a warning advises more."""


def advise_steps(num_rows: int, rows_per_step: int, epochs: int, *, least: int = 1) -> str | None:
    """Describe a training of too few steps, and the setting that gives enough; None if it has them.

    Args:
        num_rows: Rows of the corpus.
        rows_per_step: As in the recipe.
        epochs: As in the recipe.
        least: The fewest rows that a step may have: one for each worker.
    """
    steps = count_steps(num_rows, rows_per_step, epochs)
    if steps >= ENOUGH_STEPS or not num_rows:
        return None
    smaller = max(num_rows * epochs // ENOUGH_STEPS, least, 1)
    remedies: list[str] = []
    if smaller < rows_per_step:
        remedies.append(f"lower train.rows_per_step to {smaller}")
    chosen = min(smaller, rows_per_step)
    if count_steps(num_rows, chosen, epochs) < ENOUGH_STEPS:
        enough = -(-ENOUGH_STEPS // count_steps(num_rows, chosen, 1))
        remedies.append(f"raise train.epochs to {enough}")
    remedy = " and ".join(remedies)
    number = "1 step" if steps == 1 else f"{steps} steps"
    return f"training has {number} of {rows_per_step} rows, which is few; {remedy}"


def count_steps(num_rows: int, rows_per_step: int, epochs: int) -> int:
    """Count the optimizer steps of a run; the last one of each epoch may have fewer rows."""
    return epochs * -(-num_rows // rows_per_step)
