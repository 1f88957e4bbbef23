"""The three views of stored rows: captured, aligned, and fused as they are read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from rayfuse.config.base import UserError
from rayfuse.config.fuse import FuseSettings
from rayfuse.fuse.reader import OpenShard, ShardOpener
from rayfuse.interop.block import LEARNED, RowBlock
from rayfuse.storage.codec import decode_probs, flatten_column, flatten_positions
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.manifest import Commit, check_inputs
from rayfuse.storage.seal import ShardError

View = Literal["captured", "aligned", "fused"]

VIEWS: tuple[View, ...] = ("captured", "aligned", "fused")


READ_ROWS = 64
"""Rows that are decoded or fused at a time."""


def check_view(view: str) -> None:
    """Check that there is a view of this name.

    Raises:
        UserError: There is none.
    """
    if view not in VIEWS:
        raise UserError(f"view is {view!r}; the views are {', '.join(VIEWS)}")


@runtime_checkable
class OpenRows(Protocol):
    """The rows of a shard, in memory."""

    def read(self, rows: Int[np.ndarray, " rows"]) -> RowBlock:
        """Decode some rows, in the given order."""
        ...


@runtime_checkable
class RowReader(Protocol):
    """Opens the shards of a view. It pickles, and starts no threads, so it may be forked."""

    @property
    def rows_per_shard(self) -> list[int]:
        """Rows of each shard."""
        ...

    def open_shard(self, shard: int) -> OpenRows:
        """Read a shard.

        Raises:
            ShardError: It is missing or corrupt.
        """
        ...


def read_rows(
    reader: RowReader, shard: int, rows: Int[np.ndarray, " rows"]
) -> Iterator[dict[str, Any]]:
    """Yield rows of one shard in the given order.

    Raises:
        ShardError: The shard is missing or corrupt.
    """
    opened = reader.open_shard(shard)
    for start in range(0, len(rows), READ_ROWS):
        yield from opened.read(rows[start : start + READ_ROWS]).iterate()


def read_table(reader: RowReader, shard: int) -> pa.Table:
    """Read one shard as an Arrow table, arrays as lists.

    Raises:
        ShardError: The shard is missing or corrupt.
    """
    rows = np.arange(reader.rows_per_shard[shard])
    return reader.open_shard(shard).read(rows).to_arrow()


@dataclass(frozen=True)
class CapturedReader:
    """Reads what one source predicted, in its own tokens."""

    captured: DataSet
    commits: Mapping[int, Commit]

    @property
    def rows_per_shard(self) -> list[int]:
        """Rows of each shard."""
        return [self.commits[shard].rows for shard in sorted(self.commits)]

    def open_shard(self, shard: int) -> OpenRows:
        """Read a shard."""
        return _Captured(self.captured.read_shard(self.commits[shard]))


@dataclass(frozen=True)
class _Captured:
    table: pa.Table

    def read(self, rows: Int[np.ndarray, " rows"]) -> RowBlock:
        table = self.table.take(rows)
        token_ids, offsets = flatten_column(table, "token_ids")
        tokens = len(token_ids)
        return RowBlock(
            lengths=np.diff(offsets),
            per_row={name: table[name].to_numpy() for name in ("row_id", "nats")},
            per_token={
                "token_ids": token_ids,
                **_decode_entries(table, tokens),
                "draw_ids": flatten_positions(table, "draw_ids", tokens),
                "draw_counts": flatten_positions(table, "draw_counts", tokens),
                "next_logprobs": _widen(table, "next_logprobs"),
            },
        )


@dataclass(frozen=True)
class AlignedReader:
    """Reads what one source predicted, in the target's tokens, with these tokens."""

    corpus: DataSet
    aligned: DataSet
    corpus_commits: Mapping[int, Commit]
    commits: Mapping[int, Commit]

    @property
    def rows_per_shard(self) -> list[int]:
        """Rows of each shard."""
        return [self.commits[shard].rows for shard in sorted(self.commits)]

    def open_shard(self, shard: int) -> OpenRows:
        """Read a shard, and the tokens of its rows."""
        of_corpus = self.corpus_commits[shard]
        check_inputs(self.commits[shard], {"corpus": of_corpus}, self.aligned.folder)
        corpus = self.corpus.read_shard(of_corpus, ["row_id", "target_ids"])
        table = self.aligned.read_shard(self.commits[shard])
        offsets = flatten_column(corpus, "target_ids")[1]
        is_same = np.array_equal(offsets, flatten_column(table, "has_signal")[1])
        if not is_same or not corpus["row_id"].equals(table["row_id"]):
            raise ShardError(f"{self.aligned.folder}: shard {shard} does not hold the corpus' rows")
        return _Aligned(table.append_column("token_ids", corpus["target_ids"]))


@dataclass(frozen=True)
class _Aligned:
    table: pa.Table

    def read(self, rows: Int[np.ndarray, " rows"]) -> RowBlock:
        table = self.table.take(rows)
        token_ids, offsets = flatten_column(table, "token_ids")
        return RowBlock(
            lengths=np.diff(offsets),
            per_row={name: table[name].to_numpy() for name in ("row_id", "nats", "num_tokens")},
            per_token={
                "token_ids": token_ids,
                "has_signal": flatten_column(table, "has_signal")[0],
                **_decode_entries(table, len(token_ids)),
                "nats_per_byte": _widen(table, "nats_per_byte"),
            },
        )


def _decode_entries(table: pa.Table, tokens: int) -> dict[str, np.ndarray]:
    """Decode ids and natural logs of the entries and of the tail; -inf where there is none."""
    ids = flatten_positions(table, "top_ids", tokens)
    codes = flatten_column(table, "top_logprobs")[0]
    tails = flatten_column(table, "tail_logprobs")[0]
    probs = np.ascontiguousarray(decode_probs(codes, ids, tails))
    logs = np.full_like(probs, -np.inf)
    np.log(probs, out=logs, where=probs > 0)
    return {"top_ids": ids, "top_logprobs": logs, "tail_logprobs": tails.astype(np.float32)}


def _widen(table: pa.Table, name: str) -> Float[np.ndarray, " tokens"]:
    return flatten_column(table, name)[0].astype(np.float32)


@dataclass(frozen=True)
class FusedReader:
    """Reads the corpus with all active sources, and fuses the rows as training does."""

    opener: ShardOpener

    @property
    def rows_per_shard(self) -> list[int]:
        """Rows of each shard."""
        return self.opener.rows_per_shard

    def open_shard(self, shard: int) -> OpenRows:
        """Read a shard of the corpus and of every active source."""
        return _Fused(self.opener.open_shard(shard), self.opener.fuse)


@dataclass(frozen=True)
class _Fused:
    shard: OpenShard
    fuse: FuseSettings

    def read(self, rows: Int[np.ndarray, " rows"]) -> RowBlock:
        fused = self.shard.read_rows(rows, self.fuse)
        assert self.shard.row_ids is not None, "the shard was read from a corpus"
        return RowBlock(
            lengths=fused.lengths,
            per_row={"row_id": self.shard.row_ids.take(rows).to_numpy()},
            per_token={
                "token_ids": fused.token_ids,
                "top_ids": fused.top.ids,
                "top_probs": fused.top.probs,
                "tail_probs": fused.top.tail,
                "sources": fused.selected,
                **({} if fused.is_learned is None else {LEARNED: fused.is_learned}),
            },
        )
