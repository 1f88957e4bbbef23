"""What a capture has done so far and what is left: for the terminal, a file and a budget."""

import time
from collections import deque
from dataclasses import asdict, dataclass, field

from rayfuse.capture.shard import ShardNumbers

MIN_ROWS = 100
"""A few rejects among fewer rows say nothing about a share."""

RATE_SECONDS = 300.0
"""Rates are of the last five minutes: machines come and go."""


@dataclass(frozen=True)
class Snapshot:
    """One source's capture at one moment; a line of metrics.jsonl."""

    time: float
    """Seconds since 1970."""
    source: str
    shards_done: int
    num_shards: int
    shards_from_others: int
    """Committed by another job while this one ran."""
    tokens: int
    """By this job."""
    rejects: int
    """By all jobs so far."""
    tokens_per_second: float
    """By all workers of this job."""
    tokens_per_second_per_worker: float
    workers: int
    busy_share: float
    """Of the workers' time, what their models computed; the rest they waited."""
    seconds_left: float | None
    dollars: float | None
    """Spent so far, by busy and idle time; without a price, nothing is said."""
    dollars_left: float | None
    batch_tokens: int
    """The smallest of any worker."""
    storage_repeats: int
    """Requests to the storage that failed and were asked again, by this job's workers."""

    def describe(self, wanted_batch_tokens: int) -> str:
        """Return the numbers that a progress bar has room for."""
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
        if self.storage_repeats:
            parts.append(f"{self.storage_repeats} requests to the storage repeated")
        if self.batch_tokens < wanted_batch_tokens:
            parts.append(f"out of memory: batches cut to {self.batch_tokens} tokens")
        return ", ".join(parts)


@dataclass
class LiveNumbers:
    """Adds up one source's shards as they come in."""

    source: str
    num_shards: int
    done_before: int
    batch_tokens: int
    dollars_per_hour: float | None = None
    """Of one worker."""
    rows: int = 0
    """Of all shards that are done, by whichever job; likewise the rejects."""
    rejects: int = 0
    tokens: int = 0
    shards: int = 0
    from_others: int = 0
    busy_seconds: float = 0.0
    idle_seconds: float = 0.0
    recent: deque[tuple[float, ShardNumbers]] = field(
        default_factory=deque[tuple[float, ShardNumbers]]
    )
    repeats: dict[str, int] = field(default_factory=dict[str, int])
    """By worker."""
    began: float = field(default_factory=time.monotonic)

    def add(self, numbers: ShardNumbers) -> None:
        """Take note of a shard."""
        self.shards += 1
        self.rows += numbers.rows
        self.rejects += numbers.rejects
        self.batch_tokens = min(self.batch_tokens, numbers.batch_tokens)
        if not numbers.is_ours:
            self.from_others += 1
            return
        self.repeats[numbers.worker] = numbers.storage_repeats
        self.tokens += numbers.tokens
        self.busy_seconds += numbers.busy_seconds
        self.idle_seconds += numbers.idle_seconds
        now = time.monotonic()
        self.recent.append((now, numbers))
        while now - self.recent[0][0] > RATE_SECONDS:
            self.recent.popleft()

    def snapshot(self) -> Snapshot:
        """Return the numbers by now."""
        now = time.monotonic()
        seconds = max(min(now - self.began, RATE_SECONDS), 1e-9)
        fresh = [numbers for at, numbers in self.recent if now - at <= RATE_SECONDS]
        rate = sum(numbers.tokens for numbers in fresh) / seconds
        workers = len({numbers.worker for numbers in fresh})
        busy = sum(numbers.busy_seconds for numbers in fresh)
        idle = sum(numbers.idle_seconds for numbers in fresh)
        left = self.num_shards - self.done_before - self.shards
        pace = (self.busy_seconds + self.idle_seconds) / max(self.shards - self.from_others, 1)
        price = None if self.dollars_per_hour is None else self.dollars_per_hour / 3600
        return Snapshot(
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
            seconds_left=left * seconds / len(fresh) if fresh else None,
            dollars=None if price is None else price * (self.busy_seconds + self.idle_seconds),
            dollars_left=None if price is None else price * pace * left,
            batch_tokens=self.batch_tokens,
            storage_repeats=sum(self.repeats.values()),
        )

    def check_rejects(self, most: float) -> None:
        """Stop a capture that loses its rows.

        Args:
            most: The share of rows that may be rejected, `capture.max_rejected_share`.

        Raises:
            ValueError: More are.
        """
        if self.rejects > most * max(self.rows, MIN_ROWS):
            raise ValueError(
                f"source {self.source}: {self.rejects} of {self.rows} rows were rejected, more "
                f"than capture.max_rejected_share ({most:.2%}); the reasons are in its folder's "
                "rejects/: check the model, or raise the share"
            )


def to_line(snapshot: Snapshot) -> dict[str, object]:
    """Return a line of metrics.jsonl."""
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in asdict(snapshot).items()
    }
