"""One job at a time trains a run: a second one says who does, and waits.

Nothing would break if both did, but all the work would be done twice.
"""

import json
import os
import socket
import time
from dataclasses import dataclass

from rayfuse.storage.store import Store

BEAT_SECONDS = 10.0
"""How often the one who trains says so."""

STALE_SECONDS = 45.0
"""Without a word for so long it counts as dead; at once where its process is known to be gone."""


@dataclass
class Lease:
    """A file in the store that says who trains a run."""

    store: Store
    name: str
    """Of the file."""
    job: str
    """Ours."""
    is_ours: bool = False
    beats: int = 0
    said_at: float = 0.0
    heard: bytes | None = None
    """What another job has said last."""
    heard_at: float = 0.0

    def take(self) -> bool:
        """Return whether it is ours, or has become so."""
        if not self.is_ours and self._is_free():
            self.is_ours = self.store.create(self.name, self._say())
        return self.is_ours

    def renew(self) -> None:
        """Say, from time to time, that we still train."""
        if self.is_ours and time.monotonic() - self.said_at > BEAT_SECONDS:
            self.store.write(self.name, self._say())

    def release(self) -> None:
        """Let others have it."""
        if self.is_ours:
            self.store.remove(self.name)
            self.is_ours = False

    @property
    def holder(self) -> str:
        """Who it belongs to, if not to us."""
        try:
            said = json.loads(self.heard or b"")
            return f"process {said['pid']} of {said['host']}"
        except (ValueError, KeyError, TypeError):
            return "another process"

    def _say(self) -> bytes:
        self.beats += 1
        self.said_at = time.monotonic()
        who = {"job": self.job, "host": socket.gethostname(), "pid": os.getpid()}
        return json.dumps(who | {"beats": self.beats}).encode()

    def _is_free(self) -> bool:
        """Return whether nobody has it; the file of a job that is dead is removed."""
        try:
            said = self.store.read(self.name)
        except FileNotFoundError:
            return True
        if said != self.heard:
            self.heard, self.heard_at = said, time.monotonic()
        if time.monotonic() - self.heard_at < STALE_SECONDS and not _is_gone(said):
            return False
        self.store.remove(self.name)
        return True


def _is_gone(said: bytes) -> bool:
    """Return whether the process that said something was one of this machine, and is no more."""
    try:
        who = json.loads(said)
        if who["host"] != socket.gethostname():
            return False
        os.kill(who["pid"], 0)
    except ProcessLookupError:
        return True
    except (ValueError, KeyError, TypeError, PermissionError):
        return False
    return False
