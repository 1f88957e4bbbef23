"""Temporary folders on the local disk. Those that a killed process left are removed by later ones.

A process holds a lock on each of its folders while it lives; a folder without one is abandoned. A
name has the node and the user, so that a disk that nodes share mixes up nothing: locks are often
known on one node only.
"""

import errno
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LINGER_SECONDS = 5.0
"""How long the holder of a folder's lock is waited for: it may be a process that is ending."""

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of file systems without locks: there, nothing is known to be abandoned."""


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
    return Path(tempfile.gettempdir(), f"{_prefix()}{name}")


def claim_scratch(folder: Path) -> int:
    """Create a temporary folder, empty, and lock it for this process.

    Folders that killed processes have left are removed first.

    Args:
        folder: Only processes that take over from one another use the same one.

    Returns:
        The lock: a file descriptor that must stay open while the folder is used.
    """
    remove_abandoned()
    until = time.monotonic() + LINGER_SECONDS
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        lock, is_locked = _open(folder)
        if lock is not None and is_locked is not False and _is_open(folder, lock):
            for path in folder.iterdir():  # the folder stays, and with it the lock on it
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            return lock
        if lock is not None:
            os.close(lock)
        if time.monotonic() > until:  # its process belongs to an attempt that has failed
            shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)


def remove_abandoned() -> None:
    """Remove the temporary folders of this user and node whose processes have ended."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_prefix()}*"):
        if folder.is_symlink():
            continue
        lock, is_locked = _open(folder)
        if lock is None:
            continue
        if is_locked and _is_open(folder, lock):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _prefix() -> str:
    return f"rayfuse-scratch-{socket.gethostname()}-{os.getuid()}-"


def _open(folder: Path) -> tuple[int | None, bool | None]:
    """Open a folder and try to lock it.

    Returns:
        The descriptor, None if the folder is gone; and whether it is locked by this process now:
        False if another one holds it, None if there are no locks.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None, False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return descriptor, False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return descriptor, None
        os.close(descriptor)
        raise
    return descriptor, True


def _is_open(folder: Path, descriptor: int) -> bool:
    """Check that a folder is the one that a descriptor was opened on."""
    with suppress(FileNotFoundError):
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    return False
