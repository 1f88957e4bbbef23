"""What a running training stores for those that watch it; nothing else reads it before the end."""

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rayfuse.runtime.logging import log_event
from rayfuse.storage.seal import seal, unseal
from rayfuse.storage.store import Store

UPLOAD_SECONDS = 15.0
"""Between two uploads of metrics.jsonl."""

MAX_UPLOAD_SHARE = 0.01
"""Of the time, for these uploads: object storage cannot append, and a long run's file is large."""

WORKERS_FILE = "workers.json"
"""Below the run's folder."""


@dataclass(frozen=True)
class TrainWorker:
    """One worker of a training."""

    rank: int
    host: str
    pid: int
    gpus: list[str]
    """The ids of its GPUs on that host; empty on CPUs."""


def write_workers(store: Store, folder: str, workers: list[TrainWorker]) -> None:
    """Write which workers train a run, replacing those of an earlier attempt."""
    record = {"time": time.time(), "workers": [asdict(worker) for worker in workers]}
    store.write(f"{folder}/{WORKERS_FILE}", seal(record))


def read_workers(store: Store, folder: str) -> list[TrainWorker]:
    """Read which workers train a run, or did so last; empty if none has begun.

    Raises:
        ShardError: The record is corrupt.
    """
    name = f"{folder}/{WORKERS_FILE}"
    try:
        record: dict[str, Any] = unseal(store.read(name), f"{store.root}/{name}")
    except FileNotFoundError:
        return []
    return [TrainWorker(**worker) for worker in record["workers"]]


class LiveUploads:
    """Writes a file in the background from time to time; it never delays a step for the storage."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name
        self.due = time.monotonic() + UPLOAD_SECONDS
        self.thread: threading.Thread | None = None

    def offer(self, encode: Callable[[], bytes]) -> None:
        """Write the file if an upload is due.

        Args:
            encode: Encodes its content; called only then.
        """
        began = time.monotonic()
        if began < self.due or (self.thread is not None and self.thread.is_alive()):
            return
        upload = threading.Thread(target=self._write, args=(encode(), began), daemon=True)
        self.thread = upload
        upload.start()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self.thread is not None:
            self.thread.join()

    def _write(self, content: bytes, began: float) -> None:
        try:
            self.store.write(self.name, content)
        except Exception as error:  # of a store; checkpoints, which count, have their own retries
            log_event("metrics not uploaded", file=self.name, error=error)
        finally:
            now = time.monotonic()
            self.due = now + max(UPLOAD_SECONDS, (now - began) / MAX_UPLOAD_SHARE)
