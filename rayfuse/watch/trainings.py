"""The progress of a training, from its metrics.jsonl, its lease and its list of workers."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayfuse.run.layout import TrainRun
from rayfuse.storage.lease import TIMEOUT_SECONDS
from rayfuse.storage.seal import ShardError
from rayfuse.storage.store import Store
from rayfuse.storage.verify import METRICS_FILE
from rayfuse.train.live import TrainWorker, read_workers

RECENT_STEPS = 20
"""Steps over which a speed is averaged."""

KEPT = (
    *("step", "is_skipped", "loss", "clm_loss", "fusion_loss", "source_shares", "tokens"),
    *("clm_weight", "learning_rate", "seconds", "wait_seconds", "tokens_per_second"),
    *("num_workers", "mfu", "memory_gib", "bits_per_byte"),
)
"""Keys of a line of metrics.jsonl that are kept."""


@dataclass(frozen=True)
class TrainingState:
    """The progress of one training."""

    name: str
    """`fused` or `clm`."""
    is_complete: bool
    records: list[dict[str, Any]]
    """Of each step, in order: keys of metrics.jsonl."""
    num_steps: int | None
    """None while the corpus is incomplete."""
    holder: str | None
    """The driver that holds its lease; None if no job trains it."""
    is_holder_silent: bool
    """The lease was not renewed for so long that the driver is presumed dead."""
    workers: list[TrainWorker]
    """Of the last attempt."""
    faults: list[str] = field(default_factory=list[str])
    """Files that cannot be read."""

    @property
    def steps(self) -> int:
        """Steps that are done, as far as they are stored."""
        return self.records[-1]["step"] if self.records else 0

    @property
    def tokens(self) -> int:
        """Target tokens learned so far."""
        return self.records[-1]["tokens"] if self.records else 0

    @property
    def worker_seconds(self) -> float:
        """Time of all steps, times the workers of each."""
        return sum(
            (record["seconds"] * record.get("num_workers", 1) for record in self.records), 0.0
        )

    @property
    def seconds_left(self) -> float | None:
        """Time for the other steps at the speed of the last ones; None if it is unknown."""
        if self.is_complete or not self.records or self.num_steps is None:
            return None
        recent = [record["seconds"] for record in self.records[-RECENT_STEPS:]]
        return max(self.num_steps - self.steps, 0) * sum(recent) / len(recent)

    @property
    def tokens_per_second(self) -> float | None:
        """Over the last steps; None before the first."""
        rates = [record["tokens_per_second"] for record in self.records[-RECENT_STEPS:]]
        return sum(rates) / len(rates) if rates else None

    def last(self, key: str) -> Any:
        """Find the newest value of a key that is not null; None if there is none."""
        values = (record.get(key) for record in reversed(self.records))
        return next((value for value in values if value is not None), None)


class TrainingReader:
    """Keeps the steps of one training between reads of the store."""

    def __init__(self, store: Store, run: TrainRun) -> None:
        self.store, self.run = store, run
        self.size = -1
        self.lines: list[bytes] = []
        self.steps: dict[int, dict[str, Any]] = {}
        self.lease: bytes | None = None
        self.lease_seen = 0.0
        """Monotonic time at which the lease was first read as it is, in seconds."""

    def refresh(self, num_steps: int | None, *, is_complete: bool) -> TrainingState:
        """Read what is new in the store.

        Args:
            num_steps: Steps of the entire run, where they are known.
            is_complete: Whether the trained model is there.
        """
        faults: list[str] = []
        read: list[Callable[[], None]] = [self._read_steps, self._read_lease]
        for part in read:
            try:
                part()
            except (ShardError, ValueError, TypeError, KeyError) as error:
                faults.append(f"{self.store.root}/{self.run.folder}: {error}")
        try:
            workers = read_workers(self.store, self.run.folder)
        except ShardError as error:
            workers = []
            faults.append(str(error))
        return TrainingState(
            name=self.run.name,
            is_complete=is_complete,
            records=[self.steps[step] for step in sorted(self.steps)],
            num_steps=num_steps,
            holder=self._describe_holder(),
            is_holder_silent=time.monotonic() - self.lease_seen > TIMEOUT_SECONDS,
            workers=workers,
            faults=faults,
        )

    def _read_steps(self) -> None:
        """Parse the lines that are new; all of them if the run was resumed from an older step.

        Raises:
            ValueError: A line is no step; it may be one that is being written.
        """
        sizes = self.store.sizes(self.run.folder)
        size = sizes.get(METRICS_FILE, -1)
        if size == self.size:
            return
        try:
            lines = self.store.read(f"{self.run.folder}/{METRICS_FILE}").splitlines()
        except FileNotFoundError:
            lines = []
        known = len(self.lines)
        if lines[:known] != self.lines:
            known, self.steps = 0, {}
        self.lines = []
        for line in lines[known:]:
            record = parse_step(line)
            self.steps[record["step"]] = record
        self.lines, self.size = lines, size

    def _read_lease(self) -> None:
        try:
            lease = self.store.read(f"{self.run.folder}/lease.json")
        except FileNotFoundError:
            lease = None
        if lease != self.lease:
            self.lease, self.lease_seen = lease, time.monotonic()

    def _describe_holder(self) -> str | None:
        if self.lease is None:
            return None
        try:
            record = json.loads(self.lease)
            return f"process {record['pid']} on {record['host']}"
        except (ValueError, KeyError, TypeError, RecursionError):
            return "a process that its lease does not name"


def parse_step(line: bytes) -> dict[str, Any]:
    """Parse a line of a training's metrics.jsonl, and keep what is shown.

    Raises:
        ValueError: It is no step.
    """
    try:
        record = json.loads(line)
        kept = {key: record[key] for key in KEPT if key in record}
        _ = kept["step"] + kept["tokens"] + kept["seconds"] + kept["tokens_per_second"]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{METRICS_FILE} has a line that is no step: {error}") from error
    return kept


def average(
    records: Sequence[dict[str, Any]], key: str, limit: int
) -> Iterator[tuple[float, float]]:
    """Yield the last step and the mean of a key, over about `limit` groups of steps.

    Args:
        records: By step.
        key: A key of metrics.jsonl; steps without a finite number are skipped.
        limit: How many groups.
    """
    stride = -(-len(records) // limit) or 1
    for start in range(0, len(records), stride):
        group = records[start : start + stride]
        values = [record[key] for record in group if _is_number(record.get(key))]
        if values:
            yield float(group[-1]["step"]), float(sum(values) / len(values))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
