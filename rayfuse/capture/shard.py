"""One shard through one source LLM: read, tokenise, score, commit."""

import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass

from rayfuse.capture.engines.base import Engine
from rayfuse.capture.rows import build_captured, tokenise_rows
from rayfuse.models.tokenizer import TextTokenizer
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.manifest import Commit
from rayfuse.storage.retry import NUM_RETRIES


@dataclass(frozen=True)
class ShardNumbers:
    """What became of one shard."""

    shard: int
    tokens: int
    rows: int
    rejects: int
    is_ours: bool
    """This worker made it; else another had committed it before."""
    worker: str
    busy_seconds: float
    """The model was computing."""
    idle_seconds: float
    """The model had waited for this shard, or for the worker's start."""
    batch_tokens: int
    """Of a batch by now: fewer than the recipe says once memory ran out."""
    storage_repeats: int
    """Requests to the storage that this worker had to repeat so far."""


class ShardCapturer:
    """A source LLM at work on shards. Calls may come from several threads.

    They take turns at the model: while it scores one shard, the next is read and tokenised and the
    last is written.
    """

    def __init__(
        self, engine: Engine, tokenizer: TextTokenizer, corpus: DataSet, captured: DataSet
    ) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.corpus, self.captured = corpus, captured
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.turn = threading.Lock()
        self.free_since = time.monotonic()

    def capture(self, shard: int) -> ShardNumbers:
        """Capture a shard, unless it is committed already, and return its numbers.

        Raises:
            ShardError: The corpus shard is missing or corrupt.
        """
        if self.captured.is_committed(shard):
            return self._describe(self.captured.read_commit(shard))
        corpus = self.corpus.read_shard(self.corpus.read_commit(shard))
        rows = tokenise_rows(corpus, self.tokenizer)
        with self.turn:
            began = time.monotonic()
            idle_seconds = began - self.free_since
            began_at = time.time()
            records = self.engine.score_rows(rows)
            self.free_since = time.monotonic()
        table, rejects = build_captured(corpus, rows, records, self.tokenizer.eos_id)
        commit = self.captured.write_shard(
            shard,
            table,
            tokens=sum(len(row) for row in rows),
            rejects=rejects,
            stats={
                "began": began_at,
                "busy_seconds": self.free_since - began,
                "idle_seconds": idle_seconds,
            },
            worker=self.worker,
        )
        return self._describe(commit)

    def _describe(self, commit: Commit) -> ShardNumbers:
        return ShardNumbers(
            shard=commit.shard,
            tokens=commit.tokens,
            rows=commit.rows,
            rejects=commit.rejects,
            is_ours=commit.worker == self.worker,
            worker=commit.worker,
            busy_seconds=commit.stats.get("busy_seconds", 0.0),
            idle_seconds=commit.stats.get("idle_seconds", 0.0),
            batch_tokens=self.engine.batch_tokens,
            storage_repeats=NUM_RETRIES.count,
        )
