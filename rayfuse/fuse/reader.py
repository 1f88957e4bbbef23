"""Reads the corpus zipped with every active source, shard by shard, and fuses the rows."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from rayfuse.config.fuse import FuseSettings
from rayfuse.fuse.nll import nll_of_documents, nll_of_positions, nll_of_rows
from rayfuse.fuse.posterior import weigh_by_posterior
from rayfuse.fuse.rules import OpenSource, give_tail_to, load_rule, make_empty, select_lowest
from rayfuse.fuse.source_filter import select_active_sources
from rayfuse.schema import ANSWERS, INSIDE_TOKEN
from rayfuse.storage.chat_columns import has_answers, mask_learned
from rayfuse.storage.codec import (
    EncodedTopK,
    TopK,
    flatten_column,
    flatten_positions,
    join_ranges,
    number_documents,
)
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.manifest import check_inputs
from rayfuse.storage.seal import ShardError

MIN_WEIGHT = np.float32(1e-30)
"""Lower bound of a posterior weight, of which the log is taken."""


@dataclass(frozen=True)
class FusedRows:
    """Rows one after the other, with one distribution per position: the input of training."""

    token_ids: Int[np.ndarray, " tokens"]
    lengths: Int[np.ndarray, " rows"]
    top: TopK
    """Distribution of the next token: no token twice, empty where no source is active. A row's last
    position has no next token; its distribution is never used."""
    selected: Int[np.ndarray, " tokens"]
    """The number of the active source with the lowest NLL; -1 where none is active."""
    is_learned: Bool[np.ndarray, " tokens"] | None = None
    """Of conversations: positions whose next token is learned; None for all."""

    @property
    def has_signal(self) -> Bool[np.ndarray, " tokens"]:
        """Positions with an active source; with the tail their entries sum to 1."""
        return self.selected >= 0


@dataclass(frozen=True)
class OpenShard:
    """A shard's rows of the corpus and of every active source, in memory."""

    target_ids: Int[np.ndarray, " tokens"]
    offsets: Int[np.ndarray, " rows_plus_1"]
    sources: tuple[OpenSource, ...]
    selected: Int[np.ndarray, " tokens"]
    """The source with the lowest NLL at each position; -1 where none is active."""
    row_ids: pa.ChunkedArray | None = None
    """The name of each row."""
    is_learned: Bool[np.ndarray, " tokens"] | None = None
    """As in `FusedRows`."""

    def read_rows(self, rows: Int[np.ndarray, " rows"], settings: FuseSettings) -> FusedRows:
        """Fuse some rows."""
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        at = join_ranges(starts, lengths)
        selected = self.selected[at]
        top = make_empty(len(at))
        if self.sources:
            top = load_rule(settings.method)(self.sources, at, selected, settings)
        if settings.tail == "truth":
            next_ids = self.target_ids[np.minimum(at + 1, len(self.target_ids) - 1)]
            top = give_tail_to(next_ids, top, selected >= 0)
        is_learned = None if self.is_learned is None else self.is_learned[at]
        return FusedRows(self.target_ids[at], lengths, top, selected, is_learned)


class ShardOpener:
    """Opens shards of the corpus with every active source. It starts no threads, and pickles."""

    def __init__(
        self,
        corpus: DataSet,
        aligned: Mapping[str, DataSet],
        fuse: FuseSettings,
        token_bytes: Int[np.ndarray, " vocab"],
        *,
        learns_context: bool = False,
    ) -> None:
        """List the shards' commits; no shard is opened yet.

        Args:
            corpus: The rows.
            aligned: Each source's aligned rows, by the source's name; none for CLM. Sources that
                are not active are not read: see `select_active_sources`.
            fuse: How sources become one distribution.
            token_bytes: The number of bytes of each target token.
            learns_context: In conversations, learn all tokens, not only those of answers.
        """
        self.learns_context = learns_context
        active, _ = select_active_sources(aligned, fuse)
        self.fuse, self.token_bytes, self.names = fuse, token_bytes, tuple(active)
        self.data = [corpus, *(aligned[name] for name in active)]
        self.weights = [fuse.weights.get(name, 1.0) for name in active]
        self.commits = [corpus.commits(), *active.values()]

    @property
    def rows_per_shard(self) -> list[int]:
        """Rows of each shard of the corpus."""
        return [self.commits[0][shard].rows for shard in sorted(self.commits[0])]

    def open_shard(self, shard: int) -> OpenShard:
        """Read a shard's rows of the corpus and of every active source.

        Raises:
            ShardError: A shard is missing or corrupt, or does not hold the corpus' rows.
        """
        inputs = {"corpus": self.commits[0][shard]}
        for data, commits in zip(self.data[1:], self.commits[1:], strict=True):
            check_inputs(commits[shard], inputs, data.folder)
        corpus, *aligned = (
            data.read_shard(commit, columns)
            for data, commit, columns in zip(
                self.data,
                [commits[shard] for commits in self.commits],
                self._list_columns(shard),
                strict=True,
            )
        )
        for data, table in zip(self.data[1:], aligned, strict=True):
            if not table["row_id"].equals(corpus["row_id"]):
                raise ShardError(f"{data.folder}: shard {shard} does not hold the corpus' rows")
        target_ids, offsets = flatten_column(corpus, "target_ids")
        num_bytes = np.append(self.token_bytes[target_ids[1:]], 0)[: len(target_ids)]
        num_bytes[offsets[1:] - 1] = 0  # the token after a row's last is another row's
        if self.fuse.uses_posterior and aligned:
            nll = self._rate_prefixes(corpus, aligned, num_bytes, offsets)
        else:
            nll = [
                nll_of_positions(_nats_per_byte(table), num_bytes, rated, offsets, self.fuse)
                for table, rated in zip(aligned, self._rate_rows(corpus, aligned), strict=True)
            ]
        sources = tuple(
            _open_source(table, rated, weight, self.fuse)
            for table, rated, weight in zip(aligned, nll, self.weights, strict=True)
        )
        selected = np.full(len(target_ids), -1)
        if sources:
            selected = select_lowest(np.stack([source.nll for source in sources]))
        is_learned = None
        if has_answers(corpus) and not self.learns_context:
            is_learned = mask_learned(corpus, offsets)
        selected = selected.astype(np.int16)
        return OpenShard(target_ids, offsets, sources, selected, corpus["row_id"], is_learned)

    def _list_columns(self, shard: int) -> list[list[str]]:
        """List the columns that fusion needs of a shard of the corpus, and then of each source."""
        corpus_columns = ["row_id", "num_bytes", "target_ids"]
        if ANSWERS.name in self.commits[0][shard].stats:
            corpus_columns.append(ANSWERS.name)
        aligned_columns = ["row_id", "has_signal", "top_ids", "top_logprobs", "tail_logprobs"]
        aligned_columns.append("nats")
        if self.fuse.unit == "document" or self.fuse.uses_posterior:
            corpus_columns.append("ends_document")
        if self.fuse.cost == "nats_per_token":
            aligned_columns.append("num_tokens")
        if self.fuse.unit in ("span", "token") or self.fuse.uses_posterior:
            aligned_columns.append("nats_per_byte")
        # A source's records count the positions inside its tokens if the setting was on.
        inside = [INSIDE_TOKEN.name] if self.fuse.uses_posterior else []
        return [corpus_columns] + [
            aligned_columns + inside * ("inside_tokens" in commits[shard].stats)
            for commits in self.commits[1:]
        ]

    def _rate_rows(
        self, corpus: pa.Table, aligned: Sequence[pa.Table]
    ) -> list[Float[np.ndarray, " rows"]]:
        """Compute each source's NLL of each row, or of the document that it belongs to."""
        per_byte = self.fuse.cost == "nats_per_byte"
        nats = [table["nats"].to_numpy() for table in aligned]
        sizes = [
            (corpus["num_bytes"] if per_byte else table["num_tokens"]).to_numpy()
            for table in aligned
        ]
        sums = list(zip(nats, sizes, strict=True))
        if self.fuse.unit != "document":
            return [nll_of_rows(source_nats, size) for source_nats, size in sums]
        documents = number_documents(corpus)
        is_common = np.ones(corpus.num_rows, dtype=bool)
        for source_nats in nats:
            is_common &= np.isfinite(source_nats)
        return [
            nll_of_documents(source_nats, size, documents, is_common) for source_nats, size in sums
        ]

    def _rate_prefixes(
        self,
        corpus: pa.Table,
        aligned: Sequence[pa.Table],
        num_bytes: Int[np.ndarray, " tokens"],
        offsets: Int[np.ndarray, " rows_plus_1"],
    ) -> list[Float[np.ndarray, " tokens"]]:
        """Compute -log of each source's posterior weight at each position, from the text before it.

        Infinite in rows that the source rejected.
        """
        has_row = np.stack([np.isfinite(table["nats"].to_numpy()) for table in aligned])
        starts_token = np.stack([_find_token_starts(table) for table in aligned])
        per_byte = [flatten_column(table, "nats_per_byte")[0] for table in aligned]
        nats = np.stack(per_byte).astype(np.float32) * num_bytes.astype(np.float32)
        weigh = partial(
            weigh_by_posterior,
            has_row=has_row,
            documents=number_documents(corpus),
            prior=self.weights,
            switch_rate=self.fuse.switch_rate,
        )
        if has_answers(corpus):  # what precedes an answer is no evidence: weights stay over it
            is_read = mask_learned(corpus, offsets)
            read_offsets = np.concatenate([[0], np.cumsum(is_read)])[offsets]
            weights = np.ones(nats.shape, dtype=np.float32)
            weights[:, is_read] = weigh(
                nats[:, is_read], starts_token[:, is_read], offsets=read_offsets
            )
        else:
            weights = weigh(nats, starts_token, offsets=offsets)
        return [
            np.where(known, -np.log(of_source), np.float32(np.inf))
            for of_source, known in zip(
                np.maximum(weights, MIN_WEIGHT),
                np.repeat(has_row, np.diff(offsets), axis=1),
                strict=True,
            )
        ]


class ShardReader:
    """Reads shards in the background, and keeps those open that the coming steps draw from."""

    def __init__(
        self,
        corpus: DataSet,
        aligned: Mapping[str, DataSet],
        fuse: FuseSettings,
        token_bytes: Int[np.ndarray, " vocab"],
        *,
        learns_context: bool = False,
    ) -> None:
        """List the shards' commits as `ShardOpener` does; no shard is opened yet."""
        self.opener = ShardOpener(corpus, aligned, fuse, token_bytes, learns_context=learns_context)
        self.fuse, self.names = fuse, self.opener.names
        self.rows_per_shard = self.opener.rows_per_shard
        self.open: dict[int, Future[OpenShard]] = {}
        self.pool = ThreadPoolExecutor(max_workers=1)

    def keep(self, shards: set[int]) -> None:
        """Prefetch those of the shards that are not open yet, and close all others."""
        for shard in sorted(set(self.open) - shards):
            self.open.pop(shard).cancel()
        for shard in sorted(shards - set(self.open)):
            self.open[shard] = self.pool.submit(self.opener.open_shard, shard)

    def read_rows(self, rows: Int[np.ndarray, "rows 2"]) -> FusedRows:
        """Fuse rows of shards that `keep` has opened; the result is sorted by shard.

        Args:
            rows: Shard number and row number of each.

        Raises:
            ShardError: A shard is missing or corrupt, or does not hold the corpus' rows.
        """
        parts: list[FusedRows] = []
        for shard in np.unique(rows[:, 0]).tolist():
            opened = self.open[shard].result()
            parts.append(opened.read_rows(rows[rows[:, 0] == shard, 1], self.fuse))
        return join_rows(parts)


def _find_token_starts(table: pa.Table) -> Bool[np.ndarray, " tokens"]:
    """Find the positions where a token of the source starts: all before have ended."""
    has_signal = flatten_column(table, "has_signal")[0]
    if INSIDE_TOKEN.name not in table.column_names:
        return has_signal
    return has_signal & ~flatten_column(table, INSIDE_TOKEN.name)[0]


def _nats_per_byte(table: pa.Table) -> Float[np.ndarray, " tokens"] | None:
    """Look up the NLL of each position's next token per byte; None if it was not read."""
    has_column = "nats_per_byte" in table.column_names
    return flatten_column(table, "nats_per_byte")[0] if has_column else None


def _open_source(
    table: pa.Table,
    nll: Float[np.ndarray, " tokens"],
    weight: float,
    fuse: FuseSettings,
) -> OpenSource:
    top_ids = flatten_positions(table, "top_ids", len(nll))
    codes = flatten_column(table, "top_logprobs")[0].reshape(top_ids.shape)
    tails = flatten_column(table, "tail_logprobs")[0]
    has_signal = flatten_column(table, "has_signal")[0]
    if fuse.tail == "renormalise":
        # Without a head there is nothing to scale up to 1. float16 rounds some full tails to just
        # below 1, so the entries themselves are looked at too.
        has_signal = has_signal & (tails < 0) & (top_ids >= 0).any(axis=1)
    top = EncodedTopK(top_ids, codes, tails)
    return OpenSource(top, np.where(has_signal, nll, np.inf), weight)


def join_rows(parts: Sequence[FusedRows]) -> FusedRows:
    """Concatenate rows of several shards; their sources must be the same ones in the same order."""
    if len(parts) == 1:
        return parts[0]
    entries = max((part.top.ids.shape[1] for part in parts), default=0)
    tops = [make_empty(0, entries), *(_widen(part.top, entries) for part in parts)]
    return FusedRows(
        token_ids=np.concatenate([np.zeros(0, np.int32), *(part.token_ids for part in parts)]),
        lengths=np.concatenate([np.zeros(0, np.int64), *(part.lengths for part in parts)]),
        top=TopK(
            ids=np.concatenate([top.ids for top in tops]),
            probs=np.concatenate([top.probs for top in tops]),
            tail=np.concatenate([top.tail for top in tops]),
        ),
        selected=np.concatenate([np.zeros(0, np.int16), *(part.selected for part in parts)]),
        is_learned=_join_masks([part.is_learned for part in parts]),
    )


def _join_masks(
    parts: Sequence[Bool[np.ndarray, " tokens"] | None],
) -> Bool[np.ndarray, " tokens"] | None:
    """Join masks: all or none of the rows of a corpus are conversations."""
    masks = [part for part in parts if part is not None]
    return np.concatenate(masks) if masks else None


def _widen(top: TopK, entries: int) -> TopK:
    """Append empty entries, up to a number of them."""
    room = ((0, 0), (0, entries - top.ids.shape[1]))
    if not room[1][1]:
        return top
    return TopK(np.pad(top.ids, room, constant_values=-1), np.pad(top.probs, room), top.tail)
