"""The fused rows of a step -> micro-batches: rows packed into sequences, sequences stacked."""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from rayfuse.fuse.reader import FusedRows, ShardReader
from rayfuse.fuse.rules import make_empty
from rayfuse.storage.codec import TopK, join_ranges
from rayfuse.train.order import count_steps, order_rows

PREFETCH_STEPS = 2
"""Steps that are built in the background; for as many more, shards are read."""


@dataclass(frozen=True)
class MicroBatch:
    """Stacked sequences, and the training targets of each position that has a next token."""

    token_ids: Int[np.ndarray, "batch seq_len"]
    """Padded on the right with id 0."""
    position_ids: Int[np.ndarray, "batch seq_len"] | None
    """Each token's position in its row, from which attention sees the boundaries of packed rows;
    None if every sequence is one row."""
    positions: Int[np.ndarray, " positions"]
    """Their indices in the flattened batch."""
    next_ids: Int[np.ndarray, " positions"]
    sources: Int[np.ndarray, " positions"]
    """The number of the source with the lowest cost; -1 where no source has a signal."""
    top: TopK
    """The fused distributions."""


@dataclass(frozen=True)
class Packing:
    """How rows are put into sequences and micro-batches."""

    sequence_tokens: int
    sequences: int
    """Sequences of a micro-batch."""
    is_packed: bool
    """Whether several rows may share a sequence."""
    boundaries: tuple[int, ...] = ()
    """`CausalLM.length_boundaries`: rows on both sides of one never share a micro-batch."""


@dataclass(frozen=True)
class StepPlan:
    """How the rows of the corpus are divided into steps."""

    seed: int
    epochs: int
    rows_per_step: int
    """Rows of all workers."""


@dataclass(frozen=True)
class Step:
    """One worker's part of an optimizer step."""

    batches: list[MicroBatch]
    batch_id: str
    """A hash of the rows of all workers: equal steps have equal ids."""


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack rows into sequences by first-fit decreasing, and return the rows of each sequence.

    Args:
        lengths: Tokens of each row; a row longer than a sequence has one for itself.
        capacity: Tokens of a sequence.
    """
    sequences: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        fits = (number for number, free in enumerate(room) if lengths[row] <= free)
        number = next(fits, len(sequences))
        if number == len(sequences):
            sequences.append([])
            room.append(capacity)
        sequences[number].append(row)
        room[number] -= lengths[row]
    return sequences


def build_micro_batches(rows: FusedRows, packing: Packing) -> list[MicroBatch]:
    """Build a worker's micro-batches of a step."""
    capacity = packing.sequence_tokens if packing.is_packed else 0
    starts = np.cumsum(rows.lengths) - rows.lengths
    batches: list[MicroBatch] = []
    for group in _group_by_side(rows.lengths, packing.boundaries):
        packed = pack_rows(rows.lengths[group].tolist(), capacity)
        sequences = [group[sequence].tolist() for sequence in packed]
        batches += [
            _stack(rows, starts, sequences[first : first + packing.sequences], packing)
            for first in range(0, len(sequences), packing.sequences)
        ]
    return batches


def _group_by_side(
    lengths: Int[np.ndarray, " rows"], boundaries: tuple[int, ...]
) -> list[Int[np.ndarray, " _"]]:
    """Group rows by the boundaries that they exceed."""
    sides = np.searchsorted(np.array(boundaries, dtype=np.int64), lengths, side="left")
    return [np.flatnonzero(sides == side) for side in np.unique(sides)]


def empty_micro_batch(like: MicroBatch | None = None) -> MicroBatch:
    """Build a micro-batch of one token and no targets, for a worker that has no rows left.

    Args:
        like: A micro-batch with the number of entries and the kind of sequence to imitate.
    """
    one = np.zeros((1, 1), dtype=np.int32)
    entries = 0 if like is None else like.top.ids.shape[1]
    return MicroBatch(
        token_ids=one,
        position_ids=None if like is None or like.position_ids is None else one,
        positions=np.zeros(0, dtype=np.int64),
        next_ids=np.zeros(0, dtype=np.int32),
        sources=np.zeros(0, dtype=np.int16),
        top=make_empty(0, entries),
    )


def _stack(
    rows: FusedRows, starts: Int[np.ndarray, " rows"], sequences: list[list[int]], packing: Packing
) -> MicroBatch:
    """Build one micro-batch by gathering tokens and targets with index arrays.

    Args:
        rows: The rows of the step.
        starts: Where each row starts in the flat arrays of `rows`.
        sequences: The rows of each sequence.
        packing: Whether positions are needed.
    """
    lengths = [rows.lengths[sequence] for sequence in sequences]
    seq_len = max(int(row_lengths.sum()) for row_lengths in lengths)
    offsets = [
        number * seq_len + np.cumsum(row_lengths) - row_lengths  # of each row in the flat batch
        for number, row_lengths in enumerate(lengths)
    ]
    numbers = np.concatenate(sequences)
    row_lengths, row_offsets = rows.lengths[numbers], np.concatenate(offsets)
    source = join_ranges(starts[numbers], row_lengths)
    destination = join_ranges(row_offsets, row_lengths)
    token_ids = np.zeros((len(sequences), seq_len), dtype=np.int32)
    token_ids.reshape(-1)[destination] = rows.token_ids[source]
    position_ids = np.zeros_like(token_ids) if packing.is_packed else None
    if position_ids is not None:
        position_ids.reshape(-1)[destination] = join_ranges(np.zeros_like(row_offsets), row_lengths)
    # The last token of a row has no next one: what follows is another row.
    at = join_ranges(starts[numbers], row_lengths - 1)
    positions = join_ranges(row_offsets, row_lengths - 1)
    if rows.is_learned is not None:
        is_learned = rows.is_learned[at]
        at, positions = at[is_learned], positions[is_learned]
    return MicroBatch(
        token_ids=token_ids,
        position_ids=position_ids,
        positions=positions,
        next_ids=rows.token_ids.take(at + 1),
        sources=rows.selected.take(at),
        top=TopK(
            ids=rows.top.ids.take(at, axis=0),
            probs=rows.top.probs.take(at, axis=0),
            tail=rows.top.tail.take(at),
        ),
    )


def iterate_steps(
    reader: ShardReader,
    packing: Packing,
    plan: StepPlan,
    *,
    rank: int,
    num_workers: int,
    first_step: int = 0,
) -> Iterator[Step]:
    """Yield one worker's steps, and build the next ones in the background.

    Workers may have different numbers of micro-batches in a step.

    Args:
        reader: Reads and fuses the rows.
        packing: How rows are put into sequences.
        plan: How rows are divided into steps.
        rank: The worker's.
        num_workers: Size of the process group.
        first_step: Steps that are skipped, since a checkpoint has them.

    Raises:
        ShardError: A shard is missing or corrupt.
    """

    def build(window: list[tuple[str, Int[np.ndarray, "_ 2"]]]) -> Step:
        reader.keep({int(shard) for _, share in window for shard in np.unique(share[:, 0])})
        batch_id, rows = window[0]
        return Step(build_micro_batches(reader.read_rows(rows), packing), batch_id)

    # Two queues: the shards of the shares in `window` are being read, the steps in `pending` are
    # being built from the shares before those.
    shares = _list_shares(reader.rows_per_shard, plan, rank, num_workers, first_step)
    window: deque[tuple[str, Int[np.ndarray, "rows 2"]]] = deque()
    pending: deque[Future[Step]] = deque()
    with ThreadPoolExecutor(max_workers=1) as builder:
        try:
            for share in shares:
                window.append(share)
                if len(window) > PREFETCH_STEPS:
                    pending.append(builder.submit(build, list(window)))
                    window.popleft()
                if len(pending) > PREFETCH_STEPS:
                    yield pending.popleft().result()
            while window or pending:
                if window:
                    pending.append(builder.submit(build, list(window)))
                    window.popleft()
                yield pending.popleft().result()
        finally:
            builder.shutdown(wait=True, cancel_futures=True)
            reader.keep(set())


def _list_shares(
    rows_per_shard: Sequence[int], plan: StepPlan, rank: int, num_workers: int, first_step: int
) -> Iterator[tuple[str, Int[np.ndarray, "rows 2"]]]:
    """Yield a hash of each step's rows, and one worker's share of them."""
    steps = count_steps(sum(rows_per_shard), plan.rows_per_step, 1)
    for epoch in range(first_step // max(steps, 1), plan.epochs):
        order = order_rows(rows_per_shard, seed=plan.seed, epoch=epoch)
        for number in range(max(first_step - epoch * steps, 0), steps):
            step = order.step(number, plan.rows_per_step)
            batch_id = hashlib.sha256(step.rows.astype(np.int64).tobytes()).hexdigest()[:16]
            yield batch_id, step.share(rank, num_workers)
