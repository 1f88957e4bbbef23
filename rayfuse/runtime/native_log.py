"""What compiled libraries print on stderr, in a file instead of between the lines of a command.

Ray's C++ code writes warnings to file descriptor 2, such as one for each pool of actors. No option
of Ray's silences them for the driver alone.
"""

import faulthandler
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
        path = _name_file(folder)
        terminal = os.dup(2)  # not inherited by the processes that a command starts
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, 2)
        os.close(file)
        sys.stderr = os.fdopen(terminal, "w", buffering=1, errors="backslashreplace")
        # A process that aborts calls no `report`: without this, the terminal would show only the
        # shell's "Aborted". Ray keeps a handler that is enabled before it connects.
        faulthandler.enable(sys.stderr)
        self.path = path

    @contextmanager
    def redirect(self, folder: Path) -> Iterator[None]:
        """Send file descriptor 2 to the file for a while, where `sys.stderr` does not use it.

        In a notebook the kernel shows what is written to the descriptor as errors of the cell.

        Args:
            folder: The private folder of this user.
        """
        before = os.dup(2)
        self.path = self.path or _name_file(folder)
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, 2)
        os.close(file)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            with suppress(FileNotFoundError):  # another thread or a cleaner has removed it
                if not self.path.stat().st_size:
                    self.path.unlink()

    def report(self) -> None:
        """Name the file on the terminal if anything is in it; else remove it."""
        if self.path is None or not self.path.exists():
            return
        if self.path.stat().st_size:
            print(f"rayfuse: messages of libraries are in {self.path}", file=sys.stderr)
        else:
            self.path.unlink()


def _name_file(folder: Path) -> Path:
    """Name the file of this process, and make the folder of it."""
    logs = folder / FOLDER
    logs.mkdir(mode=0o700, exist_ok=True)
    return logs / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"


NATIVE_LOG = NativeLog()
"""Of this process."""
