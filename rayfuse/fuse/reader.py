"""Shards of the corpus zipped with every source's, and their rows fused."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import no_type_check

import numba
import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int, UInt8

from rayfuse.config.fuse import FuseSettings
from rayfuse.fuse.costs import cost_of_documents, cost_of_positions, cost_of_rows
from rayfuse.fuse.rules import AlignedRow, FusedRow, choose_cheapest, fuse_row, give_tail_to
from rayfuse.fuse.source_filter import select_active_sources
from rayfuse.storage.codec import PROB_OF_CODE, decode_probs, flatten_column
from rayfuse.storage.dataset import DataSet, ShardError


@dataclass(frozen=True)
class FusedRows:
    """Rows one after the other, and what each position is to learn."""

    token_ids: Int[np.ndarray, " tokens"]
    lengths: Int[np.ndarray, " rows"]
    fused: FusedRow
    """A row's last position has no next token; what stands there counts for nothing."""


@dataclass(frozen=True)
class OpenSource:
    """One source's aligned columns of a shard."""

    has_signal: Bool[np.ndarray, " tokens"]
    top_ids: Int[np.ndarray, "tokens entries"]
    differences: UInt8[np.ndarray, "tokens entries"]
    tail_logprobs: Float[np.ndarray, " tokens"]
    costs: Float[np.ndarray, " tokens"]
    weight: float

    def read(self, at: Int[np.ndarray, " positions"]) -> AlignedRow:
        """Return what the source says of some positions."""
        top_ids = self.top_ids.take(at, axis=0)
        tails = self.tail_logprobs.take(at).astype(np.float32)
        differences = self.differences.take(at, axis=0)
        return AlignedRow(
            has_signal=self.has_signal.take(at),
            top_ids=top_ids,
            top_probs=decode_probs(differences.reshape(-1), top_ids, tails),
            tail_probs=np.exp(tails),
            costs=self.costs.take(at),
            weight=self.weight,
        )


@dataclass(frozen=True)
class OpenShard:
    """A shard's rows of the corpus and of every source that is heard, in memory."""

    target_ids: Int[np.ndarray, " tokens"]
    offsets: Int[np.ndarray, " rows_plus_1"]
    sources: tuple[OpenSource, ...]
    winners: Int[np.ndarray, " tokens"]
    """The cheapest source at each position; -1 where none is heard."""

    def read_rows(self, rows: Int[np.ndarray, " rows"], settings: FuseSettings) -> FusedRows:
        """Return some rows and their fused distributions."""
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        ends = np.cumsum(lengths)
        at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
        fused = self._fuse(at, settings)
        if settings.tail == "truth":
            following = self.target_ids[np.minimum(at + 1, len(self.target_ids) - 1)]
            fused = give_tail_to(following, fused)
        return FusedRows(self.target_ids[at], lengths, fused)

    def _fuse(self, at: Int[np.ndarray, " positions"], settings: FuseSettings) -> FusedRow:
        if settings.method == "min_ce":
            return self._take_winners(at, settings)
        if not self.sources:
            return FusedRow.of_nothing(len(at))
        return fuse_row([source.read(at) for source in self.sources], settings)

    def _take_winners(self, at: Int[np.ndarray, " positions"], settings: FuseSettings) -> FusedRow:
        """Return what `fuse_row` does, reading at each position the source alone that is heard."""
        winners = self.winners[at]
        entries = max((source.top_ids.shape[1] for source in self.sources), default=0)
        ids = np.full((len(at), entries), -1, dtype=np.int32)
        probs = np.zeros((len(at), entries), dtype=np.float32)
        tails = np.zeros(len(at), dtype=np.float32)
        for number, source in enumerate(self.sources):
            mine = np.flatnonzero(winners == number)
            tail_logprobs = source.tail_logprobs.take(at[mine]).astype(np.float32)
            if settings.tail == "renormalise":
                tail_logprobs[:] = -np.inf
            tails[mine] = np.exp(tail_logprobs)
            _put_heads(
                *(at[mine], mine, source.top_ids, source.differences, -np.expm1(tail_logprobs)),
                *(PROB_OF_CODE, ids, probs),
            )
        return FusedRow(winners >= 0, ids, probs, tails, winners)


@numba.njit(cache=True)
@no_type_check
def _put_heads(  # noqa: PLR0917 (compiled)
    at, to, top_ids, differences, heads, prob_of_code, ids, probs
):
    """Decode the entries of some positions, as `decode_probs` does, to where they are wanted."""
    for place in range(len(at)):
        position, row = at[place], to[place]
        level, total = np.uint8(0), np.float32(0)
        for entry in range(top_ids.shape[1]):
            level = np.uint8(level + differences[position, entry])
            token_id = top_ids[position, entry]
            prob = prob_of_code[level] if token_id >= 0 else np.float32(0)
            ids[row, entry], probs[row, entry] = token_id, prob
            total += prob
        scale = heads[place] / max(total, np.float32(1e-30))
        for entry in range(top_ids.shape[1]):
            probs[row, entry] *= scale


class ShardReader:
    """Reads shards in the background, and keeps those open that steps draw from."""

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
            aligned: What each source says of them, by its name; none for CLM. Those of weight 0
                are not read, nor those that know nothing, with `fuse.skip_noise`.
            fuse: How sources become one.
            token_bytes: How many bytes each target token spells.
        """
        heard, _ = select_active_sources(aligned, fuse)
        self.fuse, self.token_bytes, self.names = fuse, token_bytes, tuple(heard)
        self.data = [corpus, *(aligned[name] for name in heard)]
        self.weights = [fuse.weights.get(name, 1.0) for name in heard]
        self.commits = [corpus.commits(), *heard.values()]
        self.open: dict[int, Future[OpenShard]] = {}
        self.pool = ThreadPoolExecutor(max_workers=1)

    @property
    def rows_per_shard(self) -> list[int]:
        """Rows of each shard of the corpus."""
        return [self.commits[0][shard].rows for shard in sorted(self.commits[0])]

    def keep(self, shards: set[int]) -> None:
        """Begin to read those of the shards that are not open yet, and let go of all others."""
        for shard in sorted(set(self.open) - shards):
            self.open.pop(shard).cancel()
        for shard in sorted(shards - set(self.open)):
            self.open[shard] = self.pool.submit(self._open_shard, shard)

    def read_rows(self, rows: Int[np.ndarray, "rows 2"]) -> FusedRows:
        """Return rows of shards that are kept and their fused distributions, shard by shard.

        Raises:
            ShardError: A shard is missing, damaged, or does not hold the corpus' rows.
        """
        parts: list[FusedRows] = []
        for shard in np.unique(rows[:, 0]).tolist():
            opened = self.open[shard].result()
            parts.append(opened.read_rows(rows[rows[:, 0] == shard, 1], self.fuse))
        return join_rows(parts)

    def _open_shard(self, shard: int) -> OpenShard:
        corpus_columns = ["row_id", "num_bytes", "target_ids"]
        aligned_columns = ["row_id", "has_signal", "top_ids", "top_logprobs", "tail_logprobs"]
        aligned_columns.append("nats")
        if self.fuse.unit == "document":
            corpus_columns.append("doc_id")
        if self.fuse.cost == "nats_per_token":
            aligned_columns.append("num_tokens")
        if self.fuse.unit in ("span", "token"):
            aligned_columns.append("nats_per_byte")
        corpus, *aligned = (
            data.read_shard(commits[shard], columns)
            for data, commits, columns in zip(
                self.data,
                self.commits,
                [corpus_columns, *[aligned_columns] * len(self.weights)],
                strict=True,
            )
        )
        for data, table in zip(self.data[1:], aligned, strict=True):
            if not table["row_id"].equals(corpus["row_id"]):
                raise ShardError(f"{data.folder}: shard {shard} does not hold the corpus' rows")
        target_ids, offsets = flatten_column(corpus, "target_ids")
        num_bytes = np.append(self.token_bytes[target_ids[1:]], 0)[: len(target_ids)]
        num_bytes[offsets[1:] - 1] = 0  # what comes next there is another row's
        sources = tuple(
            _open_source(table, num_bytes, row_costs, offsets, weight, self.fuse)
            for table, row_costs, weight in zip(
                aligned, self._cost_rows(corpus, aligned), self.weights, strict=True
            )
        )
        winners = np.full(len(target_ids), -1)
        if sources:
            heard = [np.where(each.has_signal, each.costs, np.inf) for each in sources]
            winners = choose_cheapest(np.stack(heard))
        return OpenShard(target_ids, offsets, sources, winners.astype(np.int16))

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
        for each in nats:
            is_common &= np.isfinite(each)
        return [
            cost_of_documents(*each, documents, is_common) for each in zip(nats, sizes, strict=True)
        ]


def _open_source(
    table: pa.Table,
    num_bytes: Int[np.ndarray, " tokens"],
    row_costs: Float[np.ndarray, " rows"],
    offsets: Int[np.ndarray, " rows_plus_1"],
    weight: float,
    fuse: FuseSettings,
) -> OpenSource:
    top_ids = flatten_column(table, "top_ids")[0].reshape(len(num_bytes), -1)
    tails = flatten_column(table, "tail_logprobs")[0]
    has_signal = flatten_column(table, "has_signal")[0]
    if fuse.tail == "renormalise":
        has_signal = has_signal & (tails < 0)  # all tail: there is nothing to scale up to 1
    nats_per_byte = (
        flatten_column(table, "nats_per_byte")[0] if fuse.unit in ("span", "token") else None
    )
    return OpenSource(
        has_signal=has_signal,
        top_ids=top_ids,
        differences=flatten_column(table, "top_logprobs")[0].reshape(top_ids.shape),
        tail_logprobs=tails,
        costs=cost_of_positions(nats_per_byte, num_bytes, row_costs, offsets, fuse),
        weight=weight,
    )


def join_rows(parts: Sequence[FusedRows]) -> FusedRows:
    """Return the rows of several shards as one; their sources have equal names."""
    if len(parts) == 1:
        return parts[0]
    entries = max((part.fused.top_ids.shape[1] for part in parts), default=0)
    fused = [part.fused.widen(entries) for part in parts]
    none = FusedRow.of_nothing(0).widen(entries)
    return FusedRows(
        token_ids=np.concatenate([np.zeros(0, np.int32), *(part.token_ids for part in parts)]),
        lengths=np.concatenate([np.zeros(0, np.int64), *(part.lengths for part in parts)]),
        fused=replace(
            none,
            **{
                name: np.concatenate(
                    [getattr(none, name), *(getattr(each, name) for each in fused)]
                )
                for name in vars(none)
            },
        ),
    )
