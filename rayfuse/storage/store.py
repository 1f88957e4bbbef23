"""Files under one root, local or object storage, seen as names and bytes."""

import os
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from rayfuse.storage.object_store import RETRY_SECONDS, ObjectStore

ASIDE = ".aside-"
"""Begins the names of files that are being written."""

NUM_RACERS = 4

PROBE_SECONDS = 30.0
"""How long the first requests to a storage may fail before it counts as not to be had."""


@runtime_checkable
class Store(Protocol):
    """Names and bytes. Every write is whole or not there at all."""

    @property
    def root(self) -> str:
        """The folder or URI that names are below."""
        ...

    @property
    def lists_by_prefix(self) -> bool:
        """Whether a listing by prefix costs less than one of the whole folder."""
        ...

    def read(self, name: str) -> bytes:
        """Return a file's bytes.

        Raises:
            FileNotFoundError: There is no such file.
        """
        ...

    def write(self, name: str, data: bytes) -> None:
        """Put a file, over what was there."""
        ...

    def upload(self, path: str, name: str) -> None:
        """Put a local file of any size, over what was there."""
        ...

    def download(self, name: str, path: str) -> None:
        """Get a file of any size into a local one.

        Raises:
            FileNotFoundError: There is no such file.
        """
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Put a file if there is none, and return whether it now holds these bytes.

        Bytes that no other call puts, such as a record with an attempt's own name, thus tell who
        won, even where the answer to the winning request was lost.
        """
        ...

    def sizes(self, folder: str, prefix: str = "") -> dict[str, int]:
        """Return the files right below a folder, by name within it, with their bytes.

        Args:
            folder: The folder.
            prefix: What their names begin with.
        """
        ...

    def remove(self, name: str) -> None:
        """Delete a file; one that is not there is no error."""
        ...


@dataclass(frozen=True)
class LocalStore:
    """A folder on a disk that all workers see."""

    root: str

    @property
    def lists_by_prefix(self) -> bool:
        return False

    def read(self, name: str) -> bytes:
        return self._path(name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        os.replace(self._write_aside(name, data), self._path(name))

    def upload(self, path: str, name: str) -> None:
        target = self._path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(ASIDE + uuid.uuid4().hex)
        try:
            shutil.copyfile(path, aside)
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)

    def download(self, name: str, path: str) -> None:
        shutil.copyfile(self._path(name), path)

    def create(self, name: str, data: bytes) -> bool:
        aside = self._write_aside(name, data)
        try:
            os.link(aside, self._path(name))  # refuses to replace, unlike rename
        except FileExistsError:
            return self.read(name) == data
        finally:
            aside.unlink()
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
            and not entry.name.startswith(ASIDE)
        }

    def remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return Path(self.root, name)

    def _write_aside(self, name: str, data: bytes) -> Path:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(ASIDE + uuid.uuid4().hex)
        try:
            with open(aside, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException as error:
            aside.unlink(missing_ok=True)
            if isinstance(error, OSError):
                reason = f"{error.strerror}, writing {len(data):,} bytes"
                raise OSError(error.errno, reason, str(path)) from error
            raise
        return aside


def open_store(uri: str, retry_seconds: float = RETRY_SECONDS) -> Store:
    """Return the store of a folder or of an `s3://` (or other fsspec) prefix.

    Args:
        uri: The folder or prefix.
        retry_seconds: How long one request to object storage may fail again and again.
    """
    if "://" in uri and not uri.startswith("file://"):
        return ObjectStore(uri.rstrip("/"), retry_seconds)
    return LocalStore(str(Path(uri.removeprefix("file://")).expanduser().absolute()))


def check_store(store: Store) -> None:
    """Try what shards rest on: a file is created by one writer only, and reads back.

    Raises:
        ValueError: The store cannot be written, or lets several writers create one file.
    """
    name = f".probe-{uuid.uuid4().hex}"
    if isinstance(store, ObjectStore):
        store = replace(store, retry_seconds=min(store.retry_seconds, PROBE_SECONDS))
    try:
        with ThreadPoolExecutor(NUM_RACERS) as racers:
            made = list(
                racers.map(lambda i: store.create(name, b"racer %d" % i), range(NUM_RACERS))
            )
        is_late_refused = not store.create(name, b"late")
        content = store.read(name)
        store.remove(name)
    except (OSError, ImportError) as error:
        raise ValueError(
            f"storage is {store.root!r}, which cannot be written ({error}); "
            "give a folder or bucket that every machine of the cluster may write"
        ) from error
    if sum(made) != 1 or not is_late_refused or content != b"racer %d" % made.index(True):
        raise ValueError(
            f"storage is {store.root!r}, which replaces files that it was asked to create only if "
            f"absent ({sum(made)} of {NUM_RACERS} writers were told that they had made one file); "
            "two jobs would overwrite one another: use a store with conditional writes "
            "(If-None-Match)"
        )
