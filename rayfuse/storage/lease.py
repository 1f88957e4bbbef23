"""A lease in the store: one job at a time trains a run or migrates a store; others wait.

Two holders would corrupt nothing, since commits are atomic, but they would do the work twice.
"""

import json
import os
import socket
import time
from dataclasses import dataclass

from rayfuse.storage.store import Store

RENEW_SECONDS = 10.0
"""How often the holder renews its lease: the heartbeat."""

TIMEOUT_SECONDS = 45.0
"""A holder that has not renewed for this long is presumed dead. A dead process of this machine is
detected at once."""


@dataclass
class Lease:
    """A file in the store that names the process that holds it."""

    store: Store
    file: str
    """Its name below the storage root."""
    job: str
    """Name of the job that wants it."""
    is_held: bool = False
    """By this job."""
    num_renewals: int = 0
    renewed_at: float = 0.0
    """Monotonic time of this job's last renewal, in seconds."""
    last_record: bytes | None = None
    """The file's content when another holder last changed it."""
    last_seen: float = 0.0
    """Monotonic time at which that content was first read, in seconds."""

    def acquire(self) -> bool:
        """Acquire the lease if it is free; return True if this job holds it."""
        if not self.is_held and self._remove_if_dead():
            self.is_held = self.store.create(self.file, self._encode_record())
        return self.is_held

    def renew(self) -> None:
        """Renew the lease, if this job holds it and `RENEW_SECONDS` have passed."""
        if self.is_held and time.monotonic() - self.renewed_at > RENEW_SECONDS:
            self.store.write(self.file, self._encode_record())

    def release(self) -> None:
        """Release the lease, if this job holds it."""
        if self.is_held:
            self.store.remove(self.file)
            self.is_held = False

    def find_holder(self) -> str | None:
        """Describe the process that holds the lease, or None; nothing is written.

        A process that has died on another node counts as a holder until its lease is acquired.
        """
        try:
            self.last_record = self.store.read(self.file)
        except FileNotFoundError:
            return None
        return None if _has_died_here(self.last_record) else self.holder

    @property
    def holder(self) -> str:
        """Describe the other process that holds the lease."""
        try:
            record = json.loads(self.last_record or b"")
            return f"process {record['pid']} of {record['host']}"
        except (ValueError, KeyError, TypeError, RecursionError):
            return "another process"

    def _encode_record(self) -> bytes:
        """Encode a record that differs from all earlier ones, so that others see the renewal."""
        self.num_renewals += 1
        self.renewed_at = time.monotonic()
        owner = {"job": self.job, "host": socket.gethostname(), "pid": os.getpid()}
        return json.dumps(owner | {"renewals": self.num_renewals}).encode()

    def _remove_if_dead(self) -> bool:
        """Remove the file of a dead holder; return True if there is no holder now.

        Clocks of two nodes may differ, so age is measured from when this process first read the
        content, never from a time in the file.
        """
        try:
            record = self.store.read(self.file)
        except FileNotFoundError:
            return True
        if record != self.last_record:
            self.last_record, self.last_seen = record, time.monotonic()
        if time.monotonic() - self.last_seen < TIMEOUT_SECONDS and not _has_died_here(record):
            return False
        self.store.remove(self.file)
        return True


def _has_died_here(record: bytes) -> bool:
    """Check whether the holder was a process of this machine that has ended."""
    try:
        owner = json.loads(record)
        if owner["host"] != socket.gethostname():
            return False
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    # Overflow and recursion: a foreign file in its place.
    except (ValueError, KeyError, TypeError, PermissionError, OverflowError, RecursionError):
        return False
    return False
