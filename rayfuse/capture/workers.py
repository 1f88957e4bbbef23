"""Which worker holds which GPU and works on which shard, stored beside the shards while they run.

It is shown by `rayfuse watch`, and decides nothing.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from threading import Event
from typing import Any

from rayfuse.runtime.logging import log_event
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.seal import ShardError, seal, unseal

REPORT_SECONDS = 15.0
"""Between two reports of a job."""

MAX_REPORT_SECONDS = 3600.0
"""Age of the report of a job that has ended, however the clocks of two drivers differ."""

FOLDER = "workers"
"""Below the data set's folder: a file for each job, which its driver replaces."""


@dataclass(frozen=True)
class WorkerState:
    """One actor of a capture."""

    host: str
    pid: int
    gpus: list[str]
    """The ids of its GPUs on that host; empty on CPUs."""
    started: float
    """When it began to load its model: Unix time in seconds."""
    is_loaded: bool = False
    """Its model is loaded; else it is being loaded."""
    shards: dict[str, float] = field(default_factory=dict[str, float])
    """The shards that it reads, scores or writes, each with the Unix time at which it began."""


@dataclass(frozen=True)
class WorkerReport:
    """The workers of one job and source."""

    time: float
    """Unix time in seconds, by the driver's clock."""
    workers: list[WorkerState]


class WorkerReporter:
    """Stores what the workers of one source do, every `REPORT_SECONDS`, until it is stopped."""

    def __init__(
        self, data: DataSet, job: str, list_workers: Callable[[], list[WorkerState]]
    ) -> None:
        """Store nothing yet.

        Args:
            data: The captured data set.
            job: An id of this job; jobs that capture the same source have a file each.
            list_workers: Lists the workers as they are now.
        """
        self.data, self.list_workers = data, list_workers
        self.name = f"{data.folder}/{FOLDER}/{job}.json"
        self.stopped = Event()

    def run(self) -> None:
        """Store a report again and again, and remove it at the end; for a daemon thread."""
        while not self.stopped.wait(REPORT_SECONDS):
            try:
                report = WorkerReport(time.time(), self.list_workers())
                self.data.store.write(self.name, seal(asdict(report)))
            except Exception as error:  # of Ray or a store; shards have their own retries
                log_event("workers not reported", source=self.data.name, error=error)
        try:
            self.data.store.remove(self.name)
        except Exception as error:  # a later job removes it, once it is old
            log_event("report of workers not removed", source=self.data.name, error=error)

    def stop(self) -> None:
        """Store no more reports."""
        self.stopped.set()


def drop_old_reports(data: DataSet) -> None:
    """Remove the reports of jobs that have ended without removing theirs, and corrupt ones."""
    for name in _list_reports(data):
        try:
            report = _read_report(data, name)
            is_old = report is not None and time.time() - report.time > MAX_REPORT_SECONDS
        except (ShardError, KeyError, TypeError):
            is_old = True
        if is_old:
            data.store.remove(name)


def read_reports(data: DataSet) -> list[WorkerReport]:
    """Read the reports of all jobs.

    Raises:
        ShardError: One is corrupt.
    """
    reports = [_read_report(data, name) for name in _list_reports(data)]
    return [report for report in reports if report is not None]


def _list_reports(data: DataSet) -> list[str]:
    folder = f"{data.folder}/{FOLDER}"
    names = sorted(name for name in data.store.sizes(folder) if name.endswith(".json"))
    return [f"{folder}/{name}" for name in names]


def _read_report(data: DataSet, name: str) -> WorkerReport | None:
    """Read the report of one job; None if it was removed since its folder was listed."""
    try:
        content = data.store.read(name)
    except FileNotFoundError:
        return None
    record: dict[str, Any] = unseal(content, f"{data.store.root}/{name}")
    workers = [WorkerState(**worker) for worker in record["workers"]]
    return WorkerReport(record["time"], workers)
