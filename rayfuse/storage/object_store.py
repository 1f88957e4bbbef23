"""A prefix in a bucket, through fsspec (`s3://` by s3fs); every request is retried."""

import contextlib
import hashlib
import os
import posixpath
from dataclasses import dataclass
from typing import Any

import fsspec

from rayfuse.storage.retry import RETRY_SECONDS, retry_transient
from rayfuse.storage.seal import ShardError
from rayfuse.storage.tree import Tree, build_tree

S3 = ("s3", "s3a")

ONE_PUT_BYTES = 2**32
"""s3fs sends anything shorter than this as one PUT, so that the object appears atomically."""

BLOCK_BYTES = 2**22
"""Bytes of a file that are hashed at a time."""

PARTS_AT_ONCE = 10
"""Parts of a large file that are transferred concurrently."""


def check_name(name: str, root: str) -> None:
    """Check that a name stays below its store's root.

    Raises:
        ShardError: It is absolute, or has an empty part, `.` or `..`.
    """
    if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
        raise ShardError(
            f"the name {name!r} leads out of the storage {root}; check which processes can write "
            "the storage, and run `rayfuse verify`"
        )


def hash_stream(file: Any) -> str:
    """Compute the sha256 of an open file from its position on, as hex digits."""
    digest = hashlib.sha256()
    while block := file.read(BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class ObjectStore:
    """Names and bytes in a bucket. Every write is one PUT."""

    root: str
    retry_seconds: float = RETRY_SECONDS

    @property
    def _fs(self) -> Any:
        """The connection of this process: none survives a fork, as in workers of a DataLoader."""
        process, fs = self.__dict__.get("_connection", (None, None))
        if process != os.getpid():
            fs = self._connect()
            self.__dict__["_connection"] = (os.getpid(), fs)
        return fs

    def _connect(self) -> Any:
        options: dict[str, Any] = {}
        if self._is_s3:  # `retry_transient` retries; the client's own retries would multiply its
            options["config_kwargs"] = {"retries": {"total_max_attempts": 1}}
            options["max_concurrency"] = 1  # with more, each read first requests the size
        # No cached listings: commits of other nodes must be seen.
        fs = fsspec.filesystem(
            self._protocol, use_listings_cache=False, skip_instance_cache=True, **options
        )
        if self._is_s3:
            fs.retries = 1
        return fs

    def __reduce__(self) -> tuple[type["ObjectStore"], tuple[str, float]]:
        return ObjectStore, (self.root, self.retry_seconds)  # credentials stay out of pickles

    @property
    def _protocol(self) -> str:
        return self.root.partition("://")[0]

    @property
    def _is_s3(self) -> bool:
        return self._protocol in S3

    @property
    def is_local(self) -> bool:
        return False

    @property
    def lists_by_prefix(self) -> bool:
        return self._is_s3

    def reconnect(self) -> None:
        """Drop the connection and its credentials; the next request opens and fetches them."""
        self.__dict__.pop("_connection", None)

    @retry_transient
    def read(self, name: str) -> bytes:
        return self._fs.cat_file(self._path(name))

    @retry_transient
    def write(self, name: str, data: bytes) -> None:
        self._fs.pipe_file(self._path(name), data, **self._one_put())

    @retry_transient
    def upload(self, path: str, name: str) -> None:
        self._fs.put_file(path, self._path(name), **self._in_parts())  # appears when complete

    @retry_transient
    def download(self, name: str, path: str) -> None:
        self._fs.get_file(self._path(name), path, **self._in_parts())

    @retry_transient
    def hash_file(self, name: str) -> str:
        with self._fs.open(self._path(name), "rb", cache_type="readahead") as file:
            return hash_stream(file)

    @retry_transient
    def create(self, name: str, data: bytes) -> bool:
        try:
            self._fs.pipe_file(self._path(name), data, mode="create", **self._one_put())
        except FileExistsError:
            # This very call may have created it: a client that lost the answer retries by itself.
            return self._fs.cat_file(self._path(name)) == data
        return True

    @retry_transient
    def sizes(self, folder: str, prefix: str = "") -> dict[str, int]:
        path = self._path(folder)
        try:
            if prefix and self.lists_by_prefix:
                entries = self._fs.find(path, maxdepth=1, prefix=prefix, detail=True).values()
            else:
                entries = self._fs.ls(path, detail=True, refresh=True)
        except FileNotFoundError:
            return {}
        # A name that ends in `/` is an empty object by which other clients show the folder itself.
        names = ((posixpath.basename(entry["name"]), entry) for entry in entries)
        return {
            name: entry["size"]
            for name, entry in names
            if entry["type"] == "file" and name and name.startswith(prefix)
        }

    @retry_transient
    def folders(self, folder: str) -> list[str]:
        try:
            entries = self._fs.ls(self._path(folder), detail=True, refresh=True)
        except FileNotFoundError:
            return []
        names = (entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory")
        return sorted(posixpath.basename(name) for name in names)

    @retry_transient
    def walk(self, folder: str) -> Tree:
        path = self._path(folder)
        found: dict[str, Any] = self._fs.find(path, detail=True)
        return build_tree(self._fs._strip_protocol(path), found)

    @retry_transient
    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def remove_empty(self, folder: str) -> None:
        check_name(folder, self.root)  # there are no folders: a prefix ends with its last object

    def _path(self, name: str) -> str:
        check_name(name, self.root)
        return f"{self.root}/{name}"

    def _one_put(self) -> dict[str, int]:
        return {"chunksize": ONE_PUT_BYTES} if self._is_s3 else {}

    def _in_parts(self) -> dict[str, int]:
        return {"max_concurrency": PARTS_AT_ONCE} if self._is_s3 else {}
