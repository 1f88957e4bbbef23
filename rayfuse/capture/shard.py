"""One shard through one source LLM: read, tokenize, score, commit."""

import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass

import pyarrow as pa

from rayfuse.capture.chat_rows import build_chat_captured, score_conversations
from rayfuse.capture.engines.base import Engine
from rayfuse.capture.rows import build_captured, tokenize_rows
from rayfuse.config.models import ModelSettings
from rayfuse.models.chat import load_chat_format
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.storage.chat_columns import has_answers, read_messages
from rayfuse.storage.codec import flatten_column
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.manifest import Commit
from rayfuse.storage.retry import NUM_RETRIES


@dataclass(frozen=True)
class ShardStats:
    """Counts and times of one captured shard."""

    shard: int
    tokens: int
    rows: int
    rejects: int
    is_ours: bool
    """This worker committed it; else another had before."""
    worker: str
    busy_seconds: float
    """The model computed."""
    idle_seconds: float
    """The model waited for this shard, since the one before or since the worker's start."""
    batch_tokens: int
    """Of a batch at present: fewer than the recipe's after running out of memory."""
    storage_retries: int
    """Requests to the storage that this worker has retried so far."""


SHARD_STATS = pa.schema(
    {
        "shard": pa.int64(),
        "tokens": pa.int64(),
        "rows": pa.int64(),
        "rejects": pa.int64(),
        "is_ours": pa.bool_(),
        "worker": pa.string(),
        "busy_seconds": pa.float64(),
        "idle_seconds": pa.float64(),
        "batch_tokens": pa.int64(),
        "storage_retries": pa.int64(),
    }
)
"""`ShardStats` as rows of the Ray Data stream, which may be empty."""


class ShardCapturer:
    """Captures shards with one source LLM. Thread-safe.

    Only one thread uses the model at a time: while it scores a shard, others read and tokenize the
    next one and write the last.
    """

    def __init__(
        self, engine: Engine, source: ModelSettings, corpus: DataSet, captured: DataSet
    ) -> None:
        self.engine, self.source = engine, source
        self.tokenizer = load_recipe_tokenizer(source)
        self.corpus, self.captured = corpus, captured
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.model_lock = threading.Lock()
        self.idle_since = time.monotonic()

    def capture(self, shard: int) -> ShardStats:
        """Capture a shard, unless it is committed already, and return its counts and times.

        Raises:
            ShardError: The corpus shard is missing or corrupt.
        """
        if self.captured.is_committed(shard):
            return self._describe(self.captured.read_commit(shard))
        corpus_commit = self.corpus.read_commit(shard)
        corpus = self.corpus.read_shard(corpus_commit)
        is_chat = has_answers(corpus)
        encoded = load_chat_format(self.source).encode(read_messages(corpus)) if is_chat else []
        rows = [] if is_chat else tokenize_rows(corpus, self.tokenizer)
        with self.model_lock:
            began = time.monotonic()
            idle_seconds = began - self.idle_since
            began_at = time.time()
            results = (
                score_conversations(encoded, self.engine.score_rows)
                if is_chat
                else self.engine.score_rows(rows)
            )
            self.idle_since = time.monotonic()
            busy_seconds = self.idle_since - began
        if is_chat:
            table, rejects = build_chat_captured(corpus, encoded, results)
        else:
            table, rejects = build_captured(corpus, rows, results, self.tokenizer.eos_id)
        commit = self.captured.write_shard(
            shard,
            table,
            tokens=len(flatten_column(table, "token_ids")[0]) if is_chat else sum(map(len, rows)),
            rejects=rejects,
            stats={
                "began": began_at,
                "busy_seconds": busy_seconds,
                "idle_seconds": idle_seconds,
            },
            worker=self.worker,
            inputs={"corpus": corpus_commit.identity},
        )
        return self._describe(commit)

    def _describe(self, commit: Commit) -> ShardStats:
        return ShardStats(
            shard=commit.shard,
            tokens=commit.tokens,
            rows=commit.rows,
            rejects=commit.rejects,
            is_ours=commit.worker == self.worker,
            worker=commit.worker,
            busy_seconds=commit.stats.get("busy_seconds", 0.0),
            idle_seconds=commit.stats.get("idle_seconds", 0.0),
            batch_tokens=self.engine.batch_tokens,
            storage_retries=NUM_RETRIES.count,
        )
