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
from rayfuse.storage.seal import seal, unseal

REPORT_SECONDS = 15.0
"""Between two reports of a job."""

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
        """Store a report again and again; for a daemon thread."""
        while not self.stopped.wait(REPORT_SECONDS):
            try:
                report = WorkerReport(time.time(), self.list_workers())
                self.data.store.write(self.name, seal(asdict(report)))
            except Exception as error:  # of Ray or a store; shards have their own retries
                log_event("workers not reported", source=self.data.name, error=error)

    def stop(self) -> None:
        """Store no more reports."""
        self.stopped.set()


def drop_reports(data: DataSet) -> None:
    """Remove the reports of all jobs; a job that still runs writes its own again."""
    for name in data.store.sizes(f"{data.folder}/{FOLDER}"):
        data.store.remove(f"{data.folder}/{FOLDER}/{name}")


def read_reports(data: DataSet) -> list[WorkerReport]:
    """Read the reports of all jobs.

    Raises:
        ShardError: One is corrupt.
    """
    folder = f"{data.folder}/{FOLDER}"
    found: list[WorkerReport] = []
    for name in sorted(data.store.sizes(folder)):
        if not name.endswith(".json"):
            continue
        try:
            content = data.store.read(f"{folder}/{name}")
        except FileNotFoundError:  # removed since the folder was listed
            continue
        record: dict[str, Any] = unseal(content, f"{data.store.root}/{folder}/{name}")
        workers = [WorkerState(**worker) for worker in record["workers"]]
        found.append(WorkerReport(record["time"], workers))
    return found
