"""Sums over the records of a data set; each record is read once, within a time limit."""

import math
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from rayfuse.status import RunDataSet
from rayfuse.storage.listing import NUM_READERS
from rayfuse.storage.manifest import Commit, Manifest
from rayfuse.storage.seal import ShardError, unseal
from rayfuse.storage.verify import METRICS_FILE

RECORDS_AT_ONCE = 256
"""Records between two looks at the clock."""

LIST_SECONDS = 10.0
"""How long a listing counts while records of it are still to be read."""

CHECK_SECONDS = 60.0
"""Between two checks that a complete data set still has all its files."""

MAX_POINTS = 240
"""Lines of a log that are kept, evenly spaced; the last one always."""


@dataclass
class WorkerSums:
    """What one worker has done of a data set."""

    shards: int = 0
    tokens: int = 0
    busy_seconds: float = 0.0
    idle_seconds: float = 0.0
    last_time: float = 0.0
    """When its device finished its last shard: Unix time in seconds."""


@dataclass(frozen=True)
class DataSetState:
    """The progress of a data set; the numbers of `rayfuse status` once all records are read."""

    label: str
    stage: str
    is_complete: bool
    shards: int
    num_shards: int | None
    """None while the corpus is incomplete."""
    rows: int
    tokens: int
    rejects: dict[str, int]
    """By reason."""
    unread: int
    """Records that are to be read: rows, tokens and rejects are without theirs."""
    workers: dict[str, WorkerSums] = field(default_factory=dict[str, WorkerSums])
    log: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Lines of a capture's metrics.jsonl, in order of time."""
    faults: list[str] = field(default_factory=list[str])
    """Files that cannot be read."""


class DataSetCounter:
    """Keeps the sums of one data set between reads of the store."""

    def __init__(self, part: RunDataSet) -> None:
        self.part, self.data = part, part.data
        self.log_size = -1
        self.log: list[dict[str, Any]] = []
        self.num_failed = 0
        """Records that could not be read in the last refresh; the next one reads them again."""
        self._forget()

    def _forget(self) -> None:
        self.manifest: Manifest | None = None
        self.is_intact = True
        self.checked_at = 0.0
        self.committed: set[int] = set()
        self.listed_at = -math.inf
        """When the records were listed: monotonic time in seconds."""
        self.counted: set[int] = set()
        self.rows = self.tokens = 0
        self.reasons: Counter[str] = Counter()
        self.with_rejects: list[Commit] = []
        self.workers: dict[str, WorkerSums] = {}

    def refresh(self, num_shards: int | None, deadline: float) -> DataSetState:
        """Read what is new in the store, and return the sums.

        Args:
            num_shards: The number of its corpus' shards, where it is known.
            deadline: Monotonic time, in seconds, after which no more records are read.

        Raises:
            UserError: It has another schema version.
        """
        faults: list[str] = []
        self.num_failed = 0
        try:
            manifest = self.data.read_manifest()
            if manifest is not None:
                self._count_complete(manifest, deadline)
            else:
                faults += self._count_incomplete(num_shards or 0, deadline)
        except ShardError as error:
            faults.append(str(error))
        faults += [*self._count_reasons(deadline), *self._read_log()]
        return self._describe(num_shards, faults)

    def _count_complete(self, manifest: Manifest, deadline: float) -> None:
        """Count a data set with a manifest, whose records are one file."""
        if manifest != self.manifest:
            self._forget()
            self.manifest = manifest
            self.committed = set(range(manifest.num_shards))
        if not self.counted and time.monotonic() < deadline:
            for commit in self.data.commits().values():
                self._add(commit)
        now = time.monotonic()
        if now < deadline and (not self.checked_at or now - self.checked_at > CHECK_SECONDS):
            self.is_intact, self.checked_at = self.data.is_complete(), time.monotonic()

    def _count_incomplete(self, num_shards: int, deadline: float) -> Iterator[str]:
        """Count the records that are there, and yield the faults of those that cannot be read."""
        if self.manifest is not None:  # it was removed, with the records of some shards
            self._forget()
        missing = sorted(self.committed - self.counted)
        if not missing or time.monotonic() - self.listed_at > LIST_SECONDS:
            committed = self.data.list_committed(num_shards)
            if not self.counted <= committed:  # shards were removed
                self._forget()
            self.committed, self.listed_at = committed, time.monotonic()
            missing = sorted(committed - self.counted)
        with ThreadPoolExecutor(NUM_READERS) as readers:
            for start in range(0, len(missing), RECORDS_AT_ONCE):
                if time.monotonic() >= deadline:
                    return
                shards = missing[start : start + RECORDS_AT_ONCE]
                for found in readers.map(self._read_commit, shards):
                    if isinstance(found, Commit):
                        self._add(found)
                    elif found is not None:
                        self.num_failed += 1
                        yield found

    def _read_commit(self, shard: int) -> Commit | str | None:
        """Read a record; None if it was removed meanwhile, text if it cannot be read."""
        try:
            return self.data.read_commit(shard)
        except ShardError as error:
            return None if isinstance(error.__cause__, FileNotFoundError) else str(error)

    def _add(self, commit: Commit) -> None:
        self.counted.add(commit.shard)
        self.rows += commit.rows
        self.tokens += commit.tokens
        if commit.rejects:
            self.with_rejects.append(commit)
        if commit.worker:
            sums = self.workers.setdefault(commit.worker, WorkerSums())
            stats = commit.stats
            sums.shards += 1
            sums.tokens += commit.tokens
            sums.busy_seconds += stats.get("busy_seconds", 0.0)
            sums.idle_seconds += stats.get("idle_seconds", 0.0)
            ended = stats.get("began", 0.0) + stats.get("busy_seconds", 0.0)
            sums.last_time = max(sums.last_time, ended)

    def _count_reasons(self, deadline: float) -> Iterator[str]:
        """Count rejects by reason, and yield the faults of files that cannot be read."""
        waiting, self.with_rejects = self.with_rejects, []
        for number, commit in enumerate(waiting):
            if time.monotonic() >= deadline:
                self.with_rejects += waiting[number:]
                return
            try:
                self.reasons.update(reject.reason for reject in self.data.read_rejects(commit))
            except (ShardError, ValueError) as error:
                self.with_rejects.append(commit)
                self.num_failed += 1
                yield str(error)

    def _read_log(self) -> Iterator[str]:
        """Read the log of a capture if it has grown, and yield a fault if lines are corrupt."""
        if self.part.stage != "capture":
            return
        name = f"{self.data.folder}/{METRICS_FILE}"
        size = self.data.store.sizes(self.data.folder).get(METRICS_FILE, -1)
        if size == self.log_size:
            return
        try:
            lines = self.data.store.read(name).splitlines()
        except FileNotFoundError:
            lines = []
        log: list[dict[str, Any]] = []
        faults: list[str] = []
        for line in sample_evenly(lines, MAX_POINTS):
            try:
                log.append(unseal(line, f"{self.data.store.root}/{name}", indent=None))
            except ShardError as error:
                faults.append(str(error))
        self.log = log
        self.log_size = -1 if faults else size  # a corrupt line may be one that is being written
        yield from faults[:1]

    def _describe(self, num_shards: int | None, faults: list[str]) -> DataSetState:
        manifest = self.manifest
        is_unchecked = manifest is not None and not self.checked_at
        waiting = len(self.committed) - len(self.counted) + len(self.with_rejects) + is_unchecked
        return DataSetState(
            label=self.part.label,
            stage=self.part.stage,
            is_complete=manifest is not None and self.is_intact,
            shards=len(self.committed),
            num_shards=num_shards if manifest is None else manifest.num_shards,
            rows=self.rows if manifest is None else manifest.rows,
            tokens=self.tokens if manifest is None else manifest.tokens,
            rejects=dict(self.reasons.most_common()),
            unread=waiting - self.num_failed,
            workers={name: replace(sums) for name, sums in self.workers.items()},
            log=self.log,
            faults=faults,
        )


def sample_evenly(items: list[Any], limit: int) -> list[Any]:
    """Take about `limit` items, evenly spaced, and the last one."""
    stride = -(-len(items) // limit) or 1
    return items[:-1][::stride] + items[-1:]
