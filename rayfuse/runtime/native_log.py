"""What compiled libraries print on stderr, in a file instead of between the lines of a command.

Ray's C++ code writes warnings to file descriptor 2, such as one for each pool of actors. No option
of Ray's silences them for the driver alone.
"""

import faulthandler
import os
import sys
import time
from pathlib import Path

FOLDER = "logs"
"""Below the private folder."""


class NativeLog:
    """The file that receives file descriptor 2; `sys.stderr` still is the terminal."""

    def __init__(self) -> None:
        self.path: Path | None = None

    def open(self, folder: Path) -> None:
        """Open the file, unless it is open.

        Args:
            folder: The private folder of this user.
        """
        if self.path is not None:
            return
        logs = folder / FOLDER
        logs.mkdir(mode=0o700, exist_ok=True)
        path = logs / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
        terminal = os.dup(2)  # not inherited by the processes that a command starts
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, 2)
        os.close(file)
        sys.stderr = os.fdopen(terminal, "w", buffering=1, errors="backslashreplace")
        # A process that aborts calls no `report`: without this, the terminal would show only the
        # shell's "Aborted". Ray keeps a handler that is enabled before it connects.
        faulthandler.enable(sys.stderr)
        self.path = path

    def report(self) -> None:
        """Name the file on the terminal if anything is in it; else remove it."""
        if self.path is None or not self.path.exists():
            return
        if self.path.stat().st_size:
            print(f"rayfuse: messages of libraries are in {self.path}", file=sys.stderr)
        else:
            self.path.unlink()


NATIVE_LOG = NativeLog()
"""Of this process."""
