"""Files under one root, on a local disk or in object storage, as names and bytes."""

import os
import shutil
import uuid
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import fsspec

from rayfuse.config.base import UserError, first_line
from rayfuse.storage.object_store import ObjectStore, check_name, hash_stream
from rayfuse.storage.retry import RETRY_SECONDS
from rayfuse.storage.seal import ShardError
from rayfuse.storage.tree import Tree, walk_local

TEMPORARY_PREFIX = ".aside-"
"""Begins the names of files that are being written; listings omit them."""

NUM_RACERS = 4
"""Concurrent writers of one file in the check for conditional writes."""

PROBE_SECONDS = 30.0
"""How long the first requests to a storage are retried before it counts as unusable."""


@runtime_checkable
class Store(Protocol):
    """Names and bytes. Every write is atomic, and no name or link leads outside the root."""

    @property
    def root(self) -> str:
        """The folder or URI that names are below."""
        ...

    @property
    def is_local(self) -> bool:
        """True for a folder that other libraries can open by its path."""
        ...

    @property
    def lists_by_prefix(self) -> bool:
        """True where a listing by prefix costs less than one of the entire folder."""
        ...

    def read(self, name: str) -> bytes:
        """Read a file's bytes.

        Raises:
            FileNotFoundError: There is no such file.
        """
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write a file, replacing an earlier one."""
        ...

    def upload(self, path: str, name: str) -> None:
        """Write a file from a local one of any size, replacing an earlier one.

        It is streamed: memory use does not depend on its size.
        """
        ...

    def download(self, name: str, path: str) -> None:
        """Copy a file of any size into a local one.

        It is streamed: memory use does not depend on its size.

        Raises:
            FileNotFoundError: There is no such file.
        """
        ...

    def hash_file(self, name: str) -> str:
        """Compute the sha256 of a file of any size, as hex digits.

        Raises:
            FileNotFoundError: There is no such file.
        """
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Create a file if it is absent, and return True if it now holds these bytes.

        If no other call writes the same bytes, such as a record with its attempt's own name, then
        exactly one of several concurrent calls returns True, even if the answer to the successful
        request was lost and the client retried it.
        """
        ...

    def sizes(self, folder: str, prefix: str = "") -> dict[str, int]:
        """List the files directly in a folder: their size in bytes by their name within it.

        Args:
            folder: The folder; one that does not exist has no files.
            prefix: Only names that begin with this are listed.
        """
        ...

    def folders(self, folder: str) -> list[str]:
        """List the folders directly in a folder, sorted; one that does not exist has none."""
        ...

    def walk(self, folder: str) -> Tree:
        """List all files below a folder, at any depth; one that does not exist has none.

        No link is followed.
        """
        ...

    def remove(self, name: str) -> None:
        """Delete a file; a missing one is no error."""
        ...

    def remove_empty(self, folder: str) -> None:
        """Delete a folder and those below it, as far as they hold no files."""
        ...


@dataclass(frozen=True)
class LocalStore:
    """A folder on a disk that all workers share."""

    root: str

    @property
    def is_local(self) -> bool:
        return True

    @property
    def lists_by_prefix(self) -> bool:
        return False

    def read(self, name: str) -> bytes:
        return self._existing(name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        with self._new_file(name, f"{len(data):,} bytes") as temporary:
            temporary.write_bytes(data)

    def upload(self, path: str, name: str) -> None:
        with self._new_file(name, path) as temporary:
            shutil.copyfile(path, temporary)

    def download(self, name: str, path: str) -> None:
        shutil.copyfile(self._existing(name), path)

    def hash_file(self, name: str) -> str:
        return hash_file(self._existing(name))

    def create(self, name: str, data: bytes) -> bool:
        try:
            with self._new_file(name, f"{len(data):,} bytes", replace=False) as temporary:
                temporary.write_bytes(data)
        except FileExistsError:
            return self.read(name) == data
        return True

    def sizes(self, folder: str, prefix: str = "") -> dict[str, int]:
        try:
            entries = list(os.scandir(self._path(folder)))
        except FileNotFoundError:
            return {}
        found: dict[str, int] = {}
        for entry in entries:
            if entry.name.startswith(prefix) and not entry.name.startswith(TEMPORARY_PREFIX):
                with suppress(FileNotFoundError):  # removed since the folder was listed
                    if entry.is_file():
                        found[entry.name] = entry.stat().st_size
        return found

    def folders(self, folder: str) -> list[str]:
        try:
            return sorted(e.name for e in os.scandir(self._path(folder)) if e.is_dir())
        except FileNotFoundError:
            return []

    def walk(self, folder: str) -> Tree:
        return walk_local(self._path(folder))

    def remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def remove_empty(self, folder: str) -> None:
        top = self._path(folder)
        for path, _, _ in os.walk(top, topdown=False) if not top.is_symlink() else ():
            with suppress(OSError):  # it is not empty, or is gone already
                os.rmdir(path)

    def _path(self, name: str) -> Path:
        """Build a file's path, whose folder is below the root; the file itself may be a link."""
        check_name(name, self.root)
        path = Path(self.root, name)
        self._check_inside(path.parent, name)
        return path

    def _existing(self, name: str) -> Path:
        """Build the path of a file that is read."""
        path = self._path(name)
        self._check_inside(path, name)
        return path

    def _check_inside(self, path: Path, name: str) -> None:
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.root)):
            raise ShardError(
                f"{self.root}/{name} is behind a link that leads out of the storage; replace the "
                "link by what it names, or move the entire storage"
            )

    @contextmanager
    def _new_file(self, name: str, what: str, *, replace: bool = True) -> Generator[Path]:
        """Yield a temporary path, and publish the file that is written to it under its name.

        Its bytes are on the disk before its name is, and its name before the call ends: a loss of
        power never leaves a record without what it names.

        Args:
            name: The file's name.
            what: What is written, for errors.
            replace: An earlier file of that name is replaced; else it is a FileExistsError.
        """
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(TEMPORARY_PREFIX + uuid.uuid4().hex)
        try:
            try:
                yield temporary
                _sync(temporary)
            except OSError as error:
                reason = f"{error.strerror}, writing {what}"
                raise OSError(error.errno, reason, str(path)) from error
            # Both are atomic; a link never replaces.
            (os.replace if replace else os.link)(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def hash_file(path: Path) -> str:
    """Compute the sha256 of all bytes of a local file, as hex digits."""
    with open(path, "rb") as file:
        return hash_stream(file)


def _sync(path: Path) -> None:
    """Write a file or a folder to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_store(uri: str, retry_seconds: float = RETRY_SECONDS) -> Store:
    """Open a folder, or an `s3://` or other fsspec prefix, as a store.

    Args:
        uri: The folder or prefix.
        retry_seconds: How long one request to object storage is retried.

    Raises:
        UserError: fsspec does not know the protocol, or lacks its package.
    """
    if "://" in uri and not uri.startswith("file://"):
        protocol = uri.partition("://")[0]
        try:
            fsspec.get_filesystem_class(protocol)
        except (ValueError, ImportError) as error:
            raise UserError(
                f"storage is {uri!r}, which cannot be opened: {first_line(error)}; give a folder, "
                "s3://BUCKET/PREFIX, or another URI whose fsspec package is installed"
            ) from error
        return ObjectStore(uri.rstrip("/"), retry_seconds)
    return LocalStore(str(Path(uri.removeprefix("file://")).expanduser().absolute()))


def check_store(store: Store) -> None:
    """Check what commits rest on: exactly one of several writers creates a file, and it reads back.

    Raises:
        UserError: The store cannot be written, or lets several writers create one file.
    """
    name = f".probe-{uuid.uuid4().hex}"
    if isinstance(store, ObjectStore):
        store = replace(store, retry_seconds=min(store.retry_seconds, PROBE_SECONDS))
    try:
        with ThreadPoolExecutor(NUM_RACERS) as racers:
            created = list(
                racers.map(lambda i: store.create(name, b"racer %d" % i), range(NUM_RACERS))
            )
        is_late_refused = not store.create(name, b"late")
        content = store.read(name)
        store.remove(name)
    except (OSError, ImportError) as error:
        raise UserError(
            f"storage is {store.root!r}, which cannot be written ({error}); "
            "give a folder or bucket that every node of the cluster can write"
        ) from error
    if sum(created) != 1 or not is_late_refused or content != b"racer %d" % created.index(True):
        raise UserError(
            f"storage is {store.root!r}, which ignores the condition to create a file only if "
            f"it is absent ({sum(created)} of {NUM_RACERS} concurrent writers succeeded); two jobs "
            "would overwrite each other: use a store with conditional writes (If-None-Match)"
        )
