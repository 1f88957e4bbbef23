"""Rows of a step -> micro-batches: shards are read, sources fused, rows put side by side."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from rayfuse.fuse.costs import cost_of_documents, cost_of_positions, cost_of_rows
from rayfuse.fuse.fuse import AlignedRow, FusedRow, fuse_row
from rayfuse.recipe import FuseSettings
from rayfuse.schema import decode_probs, flatten_column
from rayfuse.storage.dataset import Commit, DataSet, ShardError
from rayfuse.train.order import WINDOW_SHARDS, order_rows, rows_of_step, share_of_worker


@dataclass(frozen=True)
class MicroBatch:
    """Rows side by side, and what each position that has a next token is to learn."""

    token_ids: Int[np.ndarray, "batch seq_len"]
    """Padded on the right with id 0."""
    positions: Int[np.ndarray, " positions"]
    """Where those positions are in the flattened batch."""
    next_ids: Int[np.ndarray, " positions"]
    has_signal: Bool[np.ndarray, " positions"]
    top_ids: Int[np.ndarray, "positions entries"]
    top_probs: Float[np.ndarray, "positions entries"]
    tail_probs: Float[np.ndarray, " positions"]


@dataclass(frozen=True)
class OpenShard:
    """A shard's rows of the corpus and of every source, in memory."""

    target_ids: np.ndarray
    offsets: np.ndarray
    sources: tuple["OpenSource", ...]


@dataclass(frozen=True)
class OpenSource:
    """One source's aligned columns of a shard."""

    has_signal: np.ndarray
    top_ids: np.ndarray
    differences: np.ndarray
    tail_logprobs: np.ndarray
    nats_per_byte: np.ndarray
    row_costs: np.ndarray
    """Of each row, or of the document that it belongs to."""
    weight: float

    def read_row(
        self, row: int, part: slice, num_bytes: np.ndarray, settings: FuseSettings
    ) -> AlignedRow:
        """Return what the source says of the positions of one row."""
        top_ids, tails = self.top_ids[part], self.tail_logprobs[part]
        return AlignedRow(
            has_signal=self.has_signal[part],
            top_ids=top_ids,
            top_probs=decode_probs(self.differences[part].reshape(-1), top_ids, tails),
            tail_probs=np.exp(tails.astype(np.float32)),
            costs=cost_of_positions(
                self.nats_per_byte[part], num_bytes, float(self.row_costs[row]), settings
            ),
            weight=self.weight,
        )


class RowReader:
    """Reads rows of the corpus zipped with every source; keeps the last few shards open."""

    def __init__(
        self,
        corpus: DataSet,
        aligned: Mapping[str, DataSet],
        fuse: FuseSettings,
        token_bytes: Int[np.ndarray, " vocab"],
    ) -> None:
        """Open nothing yet.

        Args:
            corpus: The rows.
            aligned: What each source says of them, by its name; none for CLM.
            fuse: How sources become one.
            token_bytes: How many bytes each target token spells.
        """
        self.fuse, self.token_bytes = fuse, token_bytes
        self.data = [corpus, *aligned.values()]
        self.weights = [fuse.weights.get(name, 1.0) for name in aligned]
        self.commits: list[dict[int, Commit]] = [data.commits() for data in self.data]
        self.open: OrderedDict[int, OpenShard] = OrderedDict()

    @property
    def rows_per_shard(self) -> list[int]:
        """Rows of each shard of the corpus."""
        return [self.commits[0][shard].rows for shard in sorted(self.commits[0])]

    def read_row(self, shard: int, row: int) -> tuple[Int[np.ndarray, " seq_len"], FusedRow | None]:
        """Return a row's target tokens and, if there are sources, their fused distributions.

        Raises:
            ShardError: A shard is missing, damaged, or does not hold the corpus' rows.
        """
        opened = self._open_shard(shard)
        part = slice(opened.offsets[row], opened.offsets[row + 1])
        token_ids = opened.target_ids[part]
        num_bytes = np.append(self.token_bytes[token_ids[1:]], 0)  # of the next token
        sources = [source.read_row(row, part, num_bytes, self.fuse) for source in opened.sources]
        return token_ids, fuse_row(sources, self.fuse) if sources else None

    def _open_shard(self, shard: int) -> OpenShard:
        if shard not in self.open:
            self.open[shard] = self._read_shard(shard)
            if len(self.open) > WINDOW_SHARDS + 1:
                self.open.popitem(last=False)
        self.open.move_to_end(shard)
        return self.open[shard]

    def _read_shard(self, shard: int) -> OpenShard:
        tables = [
            data.read_shard(commits[shard])
            for data, commits in zip(self.data, self.commits, strict=True)
        ]
        corpus, *aligned = tables
        row_ids = corpus["row_id"].to_pylist()
        for data, table in zip(self.data[1:], aligned, strict=True):
            if table["row_id"].to_pylist() != row_ids:
                raise ShardError(f"{data.folder}: shard {shard} does not hold the corpus' rows")
        target_ids, offsets = flatten_column(corpus, "target_ids")
        sources = (
            _open_source(table, row_costs, weight, len(target_ids))
            for table, row_costs, weight in zip(
                aligned, self._cost_rows(corpus, aligned), self.weights, strict=True
            )
        )
        return OpenShard(target_ids=target_ids, offsets=offsets, sources=tuple(sources))

    def _cost_rows(
        self, corpus: pa.Table, aligned: Sequence[pa.Table]
    ) -> list[Float[np.ndarray, " rows"]]:
        """Return each source's cost of each row, or of the document that it belongs to."""
        per_byte = self.fuse.cost == "nats_per_byte"
        nats = [table["nats"].to_numpy() for table in aligned]
        sizes = [
            (corpus["num_bytes"] if per_byte else table["num_tokens"]).to_numpy()
            for table in aligned
        ]
        if self.fuse.unit != "document":
            return [cost_of_rows(*each) for each in zip(nats, sizes, strict=True)]
        documents = np.unique(corpus["doc_id"].to_pylist(), return_inverse=True)[1]
        is_common = np.ones(corpus.num_rows, dtype=bool)
        for each, weight in zip(nats, self.weights, strict=True):
            is_common &= np.isfinite(each) | (weight == 0)
        return [
            cost_of_documents(*each, documents, is_common) for each in zip(nats, sizes, strict=True)
        ]


def _open_source(
    table: pa.Table, row_costs: Float[np.ndarray, " rows"], weight: float, num_tokens: int
) -> OpenSource:
    top_ids = flatten_column(table, "top_ids")[0].reshape(num_tokens, -1)
    return OpenSource(
        has_signal=flatten_column(table, "has_signal")[0],
        top_ids=top_ids,
        differences=flatten_column(table, "top_logprobs")[0].reshape(top_ids.shape),
        tail_logprobs=flatten_column(table, "tail_logprobs")[0],
        nats_per_byte=flatten_column(table, "nats_per_byte")[0],
        row_costs=row_costs,
        weight=weight,
    )


def build_micro_batch(
    rows: Sequence[tuple[Int[np.ndarray, " _"], FusedRow | None]],
) -> MicroBatch:
    """Return rows side by side; a row's last position has no next token and learns nothing."""
    seq_len = max((len(ids) for ids, _ in rows), default=1)
    token_ids = np.zeros((max(len(rows), 1), seq_len), dtype=np.int64)
    for index, (ids, _) in enumerate(rows):
        token_ids[index, : len(ids)] = ids
    fused = [row for _, row in rows if row is not None]
    entries = max((row.top_ids.shape[1] for row in fused), default=0)
    if not fused:
        fused = [_no_distribution(len(ids)) for ids, _ in rows]
    positions = [index * seq_len + np.arange(len(ids) - 1) for index, (ids, _) in enumerate(rows)]
    return MicroBatch(
        token_ids=token_ids,
        positions=_join(positions, np.int64),
        next_ids=_join([ids[1:] for ids, _ in rows], np.int64),
        has_signal=_join([row.has_signal[:-1] for row in fused], np.bool_),
        top_ids=_join([row.top_ids[:-1] for row in fused], np.int64, entries),
        top_probs=_join([row.top_probs[:-1] for row in fused], np.float32, entries),
        tail_probs=_join([row.tail_probs[:-1] for row in fused], np.float32),
    )


def _no_distribution(num_tokens: int) -> FusedRow:
    return FusedRow(
        has_signal=np.zeros(num_tokens, dtype=bool),
        top_ids=np.zeros((num_tokens, 0), dtype=np.int32),
        top_probs=np.zeros((num_tokens, 0)),
        tail_probs=np.zeros(num_tokens),
    )


def _join(parts: Sequence[np.ndarray], dtype: Any, width: int | None = None) -> np.ndarray:
    empty = np.zeros(0 if width is None else (0, width), dtype=dtype)
    return np.concatenate([empty, *parts]).astype(dtype)


def iterate_steps(
    reader: RowReader,
    *,
    seed: int,
    epochs: int,
    rows_per_step: int,
    micro_batch_rows: int,
    rank: int,
    num_workers: int,
    first_step: int = 0,
) -> Iterator[list[MicroBatch]]:
    """Yield one worker's micro-batches, step by step from `first_step`; the next is read ahead.

    Every worker has the same number of micro-batches in each step; some may be empty.
    """
    per_worker = rows_per_step // num_workers

    def read_step(rows: Int[np.ndarray, "step_rows 2"]) -> list[MicroBatch]:
        mine = share_of_worker(rows, rank, num_workers, rows_per_step)
        read = [reader.read_row(int(shard), int(row)) for shard, row in mine]
        return [
            build_micro_batch(read[start : start + micro_batch_rows])
            for start in range(0, per_worker, micro_batch_rows)
        ]

    steps = _list_steps(reader.rows_per_shard, seed, epochs, rows_per_step, first_step)
    with ThreadPoolExecutor(max_workers=1) as ahead:
        pending = None
        for rows in steps:
            following = ahead.submit(read_step, rows)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def _list_steps(
    rows_per_shard: Sequence[int], seed: int, epochs: int, rows_per_step: int, first_step: int
) -> Iterator[Int[np.ndarray, "step_rows 2"]]:
    steps_per_epoch = -(-sum(rows_per_shard) // rows_per_step)
    for epoch in range(first_step // max(steps_per_epoch, 1), epochs):
        order = order_rows(rows_per_shard, seed=seed, epoch=epoch)
        start = first_step - epoch * steps_per_epoch if epoch * steps_per_epoch < first_step else 0
        for step in range(start, steps_per_epoch):
            yield rows_of_step(order, step, rows_per_step)
