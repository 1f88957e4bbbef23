"""Temporary folders on the local disk. Those that a killed process left are removed by later ones.

A process holds a lock on each of its folders while it lives; a folder without one is abandoned.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "rayfuse-scratch-"


@contextmanager
def scratch_folder(kind: str) -> Iterator[Path]:
    """Create a temporary folder that is removed in the end, also if this process is killed.

    Args:
        kind: A word for its name.
    """
    folder = name_scratch(f"{kind}-{os.urandom(6).hex()}")
    lock = claim_scratch(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def name_scratch(name: str) -> Path:
    """Name a temporary folder for `claim_scratch`."""
    return Path(tempfile.gettempdir(), f"{PREFIX}{name}")


def claim_scratch(folder: Path) -> int:
    """Create a temporary folder, empty, and lock it for this process.

    Folders that killed processes of this user have left are removed first.

    Args:
        folder: Only processes that take over from one another use the same one.

    Returns:
        The lock: a file descriptor that must stay open while the folder is used.
    """
    remove_abandoned()
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        lock = _lock(folder)
        if lock is not None and folder.exists() and os.fstat(lock).st_ino == folder.stat().st_ino:
            return lock
        if lock is not None:  # another process took the folder for abandoned before it was locked
            os.close(lock)


def remove_abandoned() -> None:
    """Remove this user's temporary folders whose processes have ended."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = _lock(folder)
        except OSError:  # another process has removed it
            continue
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder; None if a process holds it, or it is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
