"""Files under one root, on a local disk or in object storage, as names and bytes."""

import os
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import fsspec

from rayfuse.config.base import UserError, first_line
from rayfuse.storage.object_store import ObjectStore
from rayfuse.storage.retry import RETRY_SECONDS

TEMPORARY_PREFIX = ".aside-"
"""Begins the names of files that are being written; listings omit them."""

NUM_RACERS = 4
"""Concurrent writers of one file in the check for conditional writes."""

PROBE_SECONDS = 30.0
"""How long the first requests to a storage are retried before it counts as unusable."""


@runtime_checkable
class Store(Protocol):
    """Names and bytes. Every write is atomic."""

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

    def remove(self, name: str) -> None:
        """Delete a file; a missing one is no error."""
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
        return self._path(name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        os.replace(self._write_temporary(name, data), self._path(name))

    def upload(self, path: str, name: str) -> None:
        target = self._path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(TEMPORARY_PREFIX + uuid.uuid4().hex)
        try:
            shutil.copyfile(path, temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def download(self, name: str, path: str) -> None:
        shutil.copyfile(self._path(name), path)

    def create(self, name: str, data: bytes) -> bool:
        temporary = self._write_temporary(name, data)
        try:
            os.link(temporary, self._path(name))  # atomic, and unlike rename never replaces
        except FileExistsError:
            return self.read(name) == data
        finally:
            temporary.unlink()
        return True

    def sizes(self, folder: str, prefix: str = "") -> dict[str, int]:
        try:
            entries = list(os.scandir(self._path(folder)))
        except FileNotFoundError:
            return {}
        return {
            entry.name: entry.stat().st_size
            for entry in entries
            if entry.name.startswith(prefix)
            and entry.is_file()
            and not entry.name.startswith(TEMPORARY_PREFIX)
        }

    def folders(self, folder: str) -> list[str]:
        try:
            return sorted(e.name for e in os.scandir(self._path(folder)) if e.is_dir())
        except FileNotFoundError:
            return []

    def remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return Path(self.root, name)

    def _write_temporary(self, name: str, data: bytes) -> Path:
        """Write a file beside its final name, on the disk itself, for an atomic rename."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(TEMPORARY_PREFIX + uuid.uuid4().hex)
        with ExitStack() as on_error:
            on_error.callback(temporary.unlink, missing_ok=True)
            try:
                with open(temporary, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                reason = f"{error.strerror}, writing {len(data):,} bytes"
                raise OSError(error.errno, reason, str(path)) from error
            on_error.pop_all()
        return temporary


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
