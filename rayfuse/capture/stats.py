"""Throughput, cost and counts of a running capture, for the terminal and metrics.jsonl."""

import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

from rayfuse.capture.shard import ShardStats
from rayfuse.config.base import UserError
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.seal import seal

MIN_ROWS = 100
"""Rows below which a share of rejects is not compared: a few would exceed any share."""

RATE_SECONDS = 300.0
"""Rates are over the last five minutes, since nodes join and leave."""

METRICS_SECONDS = 15.0
"""Between two lines of metrics.jsonl."""


@dataclass(frozen=True)
class CaptureStats:
    """One source's capture at one moment; a line of metrics.jsonl."""

    time: float
    """Seconds since 1970."""
    source: str
    shards_done: int
    num_shards: int
    shards_from_others: int
    """Committed by another job while this one ran."""
    tokens: int
    """Scored by this job."""
    rejects: int
    """By all jobs so far."""
    tokens_per_second: float
    """Of all workers of this job."""
    tokens_per_second_per_worker: float
    workers: int
    busy_share: float
    """Share of the workers' time in which their models computed; in the rest they waited."""
    seconds_left: float | None
    dollars: float | None
    """Cost so far, of busy and idle time; None without a price."""
    dollars_left: float | None
    batch_tokens: int
    """The smallest of any worker."""
    storage_retries: int
    """Failed requests to the storage that this job's workers have retried."""

    def describe(self, configured_batch_tokens: int) -> str:
        """Describe the capture in one line, for a progress bar."""
        parts = [
            f"{self.tokens_per_second:,.0f} tokens/s on {self.workers}",
            f"busy {self.busy_share:.0%}",
        ]
        if self.dollars is not None and self.dollars_left is not None:
            parts.append(f"${self.dollars:,.2f}, ${self.dollars_left:,.2f} left")
        if self.shards_from_others:
            parts.append(f"{self.shards_from_others} shards by another job")
        if self.rejects:
            parts.append(f"{self.rejects} rejected")
        if self.storage_retries:
            parts.append(f"{self.storage_retries} storage requests retried")
        if self.batch_tokens < configured_batch_tokens:
            parts.append(f"out of memory: batches cut to {self.batch_tokens} tokens")
        return ", ".join(parts)


@dataclass
class StatsAccumulator:
    """Adds up one source's shards as they are committed."""

    source: str
    num_shards: int
    done_before: int
    batch_tokens: int
    dollars_per_hour: float | None = None
    """Of one worker."""
    rows: int = 0
    """Of all committed shards, by any job; likewise the rejects."""
    rejects: int = 0
    tokens: int = 0
    shards: int = 0
    from_others: int = 0
    busy_seconds: float = 0.0
    idle_seconds: float = 0.0
    recent: deque[tuple[float, ShardStats]] = field(default_factory=deque[tuple[float, ShardStats]])
    retries: dict[str, int] = field(default_factory=dict[str, int])
    """By worker: each reports its own total."""
    began: float = field(default_factory=time.monotonic)

    def add(self, shard: ShardStats) -> None:
        """Add one shard."""
        self.shards += 1
        self.rows += shard.rows
        self.rejects += shard.rejects
        self.batch_tokens = min(self.batch_tokens, shard.batch_tokens)
        if not shard.is_ours:
            self.from_others += 1
            return
        self.retries[shard.worker] = shard.storage_retries
        self.tokens += shard.tokens
        self.busy_seconds += shard.busy_seconds
        self.idle_seconds += shard.idle_seconds
        now = time.monotonic()
        self.recent.append((now, shard))
        while now - self.recent[0][0] > RATE_SECONDS:
            self.recent.popleft()

    @property
    def worker_seconds(self) -> float:
        """Busy and idle time of this job's workers, for the shards that they have committed."""
        return self.busy_seconds + self.idle_seconds

    def compute_stats(self) -> CaptureStats:
        """Compute throughput, cost and counts at this moment."""
        now = time.monotonic()
        seconds = max(min(now - self.began, RATE_SECONDS), 1e-9)
        recent = [shard for at, shard in self.recent if now - at <= RATE_SECONDS]
        rate = sum(shard.tokens for shard in recent) / seconds
        workers = len({shard.worker for shard in recent})
        busy = sum(shard.busy_seconds for shard in recent)
        idle = sum(shard.idle_seconds for shard in recent)
        left = self.num_shards - self.done_before - self.shards
        worker_seconds = self.worker_seconds
        seconds_per_shard = worker_seconds / max(self.shards - self.from_others, 1)
        price = None if self.dollars_per_hour is None else self.dollars_per_hour / 3600
        return CaptureStats(
            time=time.time(),
            source=self.source,
            shards_done=self.done_before + self.shards,
            num_shards=self.num_shards,
            shards_from_others=self.from_others,
            tokens=self.tokens,
            rejects=self.rejects,
            tokens_per_second=rate,
            tokens_per_second_per_worker=rate / max(workers, 1),
            workers=workers,
            busy_share=busy / max(busy + idle, 1e-9),
            seconds_left=left * seconds / len(recent) if recent else None,
            dollars=None if price is None else price * worker_seconds,
            dollars_left=None if price is None else price * seconds_per_shard * left,
            batch_tokens=self.batch_tokens,
            storage_retries=sum(self.retries.values()),
        )

    def check_rejects(self, max_share: float) -> None:
        """Stop a capture that rejects too many rows.

        Args:
            max_share: The share of rows that may be rejected, `capture.max_rejected_share`.

        Raises:
            UserError: More are rejected.
        """
        if self.rejects > max_share * max(self.rows, MIN_ROWS):
            raise UserError(
                f"source {self.source}: {self.rejects} of {self.rows} rows were rejected, more "
                f"than capture.max_rejected_share ({max_share:.2%}); the reasons are in its "
                "folder's rejects/: check the model, or raise the share"
            )


def to_line(stats: CaptureStats) -> dict[str, Any]:
    """Convert stats to a line of metrics.jsonl."""
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in asdict(stats).items()
    }


class MetricsLog:
    """metrics.jsonl beside the shards; lines of earlier jobs are kept."""

    def __init__(self, data: DataSet) -> None:
        self.store, self.name = data.store, f"{data.folder}/metrics.jsonl"
        try:
            self.lines = self.store.read(self.name).splitlines()
        except FileNotFoundError:
            self.lines: list[bytes] = []
        self.written = -METRICS_SECONDS

    def write(self, line: dict[str, Any], *, is_last: bool) -> None:
        """Append a line, unless the previous one is recent.

        Object storage cannot append, so each write replaces the file.
        """
        if not is_last and time.monotonic() - self.written < METRICS_SECONDS:
            return
        self.written = time.monotonic()
        self.lines.append(seal(line, indent=None))
        self.store.write(self.name, b"\n".join(self.lines) + b"\n")
