"""Files under one root, local or object storage, seen as names and bytes."""

import contextlib
import os
import posixpath
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Store(Protocol):
    """Names and bytes. Every write is whole or not there at all."""

    @property
    def root(self) -> str:
        """The folder or URI that names are below."""
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

    def create(self, name: str, data: bytes) -> bool:
        """Put a file if there is none, and return whether this call did."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the files right below a folder, by name within it, with their bytes."""
        ...

    def remove(self, name: str) -> None:
        """Delete a file; one that is not there is no error."""
        ...


@dataclass(frozen=True)
class LocalStore:
    """A folder on a disk that all workers see."""

    root: str

    def read(self, name: str) -> bytes:
        return self._path(name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        os.replace(self._write_aside(name, data), self._path(name))

    def create(self, name: str, data: bytes) -> bool:
        aside = self._write_aside(name, data)
        try:
            os.link(aside, self._path(name))  # refuses to replace, unlike rename
        except FileExistsError:
            return False
        finally:
            aside.unlink()
        return True

    def sizes(self, folder: str) -> dict[str, int]:
        try:
            entries = list(os.scandir(self._path(folder)))
        except FileNotFoundError:
            return {}
        return {
            entry.name: entry.stat().st_size
            for entry in entries
            if entry.is_file() and not entry.name.startswith(".aside-")
        }

    def remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return Path(self.root, name)

    def _write_aside(self, name: str, data: bytes) -> Path:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".aside-{uuid.uuid4().hex}")
        try:
            with open(aside, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        return aside


@dataclass(frozen=True)
class ObjectStore:
    """A prefix in a bucket, through fsspec (`s3://` by s3fs)."""

    root: str

    @cached_property
    def _fs(self) -> Any:
        import fsspec

        protocol = self.root.partition("://")[0]
        # Listings are asked for anew: another machine's commits must be seen.
        return fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True)

    def __reduce__(self) -> tuple[type["ObjectStore"], tuple[str]]:
        return ObjectStore, (self.root,)  # credentials stay out of pickles

    def read(self, name: str) -> bytes:
        return self._fs.cat_file(self._path(name))

    def write(self, name: str, data: bytes) -> None:
        self._fs.pipe_file(self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        try:
            self._fs.pipe_file(self._path(name), data, mode="create")
        except FileExistsError:
            return False
        return True

    def sizes(self, folder: str) -> dict[str, int]:
        try:
            entries = self._fs.ls(self._path(folder), detail=True, refresh=True)
        except FileNotFoundError:
            return {}
        return {
            posixpath.basename(entry["name"]): entry["size"]
            for entry in entries
            if entry["type"] == "file"
        }

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"


def open_store(uri: str) -> Store:
    """Return the store of a folder or of an `s3://` (or other fsspec) prefix."""
    if "://" in uri and not uri.startswith("file://"):
        return ObjectStore(uri.rstrip("/"))
    return LocalStore(str(Path(uri.removeprefix("file://")).expanduser().absolute()))


def check_writable(store: Store) -> None:
    """Write, read and remove a small file.

    Raises:
        ValueError: The store cannot be written.
    """
    name = f".probe-{uuid.uuid4().hex}"
    try:
        created = store.create(name, b"rayfuse") and not store.create(name, b"again")
        kept = store.read(name) == b"rayfuse"
        store.remove(name)
    except OSError as error:
        raise ValueError(
            f"storage is {store.root!r}, which cannot be written ({error}); "
            "give a folder or bucket that every machine of the cluster may write"
        ) from error
    if not created or not kept:
        raise ValueError(
            f"storage is {store.root!r}, which replaces files that it was asked to create only if "
            "absent; two jobs would overwrite one another: use a store with conditional writes"
        )
