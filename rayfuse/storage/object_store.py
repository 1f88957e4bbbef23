"""A prefix in a bucket, through fsspec (`s3://` by s3fs), and patience with it."""

import contextlib
import functools
import posixpath
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Concatenate, ParamSpec, TypeVar

Given = ParamSpec("Given")
Answer = TypeVar("Answer")

RETRY_SECONDS = 300.0
"""How long one request may fail again and again before the storage counts as gone."""

LONGEST_PAUSE_SECONDS = 20.0

S3 = ("s3", "s3a")

ONE_PUT_BYTES = 2**32
"""s3fs sends anything shorter than this as one PUT: an object is whole or not there."""

PARTS_AT_ONCE = 10
"""Of a large file that goes up or comes down."""

CLIENT_ERRORS = ("aiohttp", "botocore", "urllib3")
"""Packages below fsspec whose errors are the network's or the store's."""

FINAL_ERRORS = (
    *("FileNotFoundError", "FileExistsError", "PermissionError", "IsADirectoryError"),
    *("NotADirectoryError", "NoCredentialsError", "PartialCredentialsError"),
    *("ParamValidationError", "UnknownServiceError", "ProfileNotFound", "NoRegionError"),
)
"""Asking again gets the same answer."""


class Tally:
    """A count that several threads add to."""

    def __init__(self) -> None:
        self.count, self.lock = 0, threading.Lock()

    def add(self) -> None:
        """Count one more."""
        with self.lock:
            self.count += 1


NUM_RETRIES = Tally()
"""Requests of this process that failed and were asked again."""


class StorageUnavailableError(OSError):
    """The storage has not answered for as long as it is waited for."""


def retry_transient(
    method: Callable[Concatenate["ObjectStore", Given], Answer],
) -> Callable[Concatenate["ObjectStore", Given], Answer]:
    """Repeat a request that fails for reasons that pass: 5xx, resets, time-outs, cut answers.

    Pauses grow to 20 s, each drawn at random up to its bound ("full jitter"), so that a thousand
    workers do not come back at once. Each try has a new connection and credentials fetched anew:
    those that have expired are not always called so.
    """

    @functools.wraps(method)
    def ask(store: "ObjectStore", /, *args: Given.args, **kwargs: Given.kwargs) -> Answer:
        began, tries = time.monotonic(), 0
        has_renewed = False
        while True:
            try:
                return method(store, *args, **kwargs)
            except Exception as error:
                if _has_expired(error) and not has_renewed:
                    has_renewed = True
                    store.reconnect()
                    continue
                if not is_transient(error):
                    raise
                waited = time.monotonic() - began
                if waited >= store.retry_seconds:
                    raise StorageUnavailableError(
                        f"storage {store.root} has failed for {waited:.0f} s, the last time with "
                        f"{type(error).__name__}: {error}; what is done is kept: run the same "
                        "command again once the storage is back"
                    ) from error
                bound = min(0.1 * 2**tries, LONGEST_PAUSE_SECONDS)
                time.sleep(min(random.uniform(0, bound), store.retry_seconds - waited))
                tries += 1
                NUM_RETRIES.add()
                store.reconnect()

    return ask


def is_transient(error: BaseException) -> bool:
    """Return whether the same request may succeed later."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & set(FINAL_ERRORS):
        return False
    is_clients = type(error).__module__.partition(".")[0] in CLIENT_ERRORS
    return is_clients or isinstance(error, OSError | TimeoutError)


def _has_expired(error: BaseException) -> bool:
    response = getattr(error.__cause__, "response", None)
    return isinstance(response, dict) and response["Error"].get("Code") == "ExpiredToken"


@dataclass(frozen=True)
class ObjectStore:
    """Names and bytes in a bucket. Every write is one PUT."""

    root: str
    retry_seconds: float = RETRY_SECONDS

    @cached_property
    def _fs(self) -> Any:
        import fsspec

        options: dict[str, Any] = {}
        if self._is_s3:  # one patience, ours: the client's own would multiply it
            options["config_kwargs"] = {"retries": {"total_max_attempts": 1}}
            options["max_concurrency"] = 1  # with more, each read first asks for the size
        # Listings are asked for anew: another machine's commits must be seen.
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
    def lists_by_prefix(self) -> bool:
        return self._is_s3

    def reconnect(self) -> None:
        """Forget the connection and its credentials; the next request makes both anew."""
        self.__dict__.pop("_fs", None)

    @retry_transient
    def read(self, name: str) -> bytes:
        return self._fs.cat_file(self._path(name))

    @retry_transient
    def write(self, name: str, data: bytes) -> None:
        self._fs.pipe_file(self._path(name), data, **self._one_put())

    @retry_transient
    def upload(self, path: str, name: str) -> None:
        self._fs.put_file(path, self._path(name), **self._in_parts())  # seen when complete

    @retry_transient
    def download(self, name: str, path: str) -> None:
        self._fs.get_file(self._path(name), path, **self._in_parts())

    @retry_transient
    def create(self, name: str, data: bytes) -> bool:
        try:
            self._fs.pipe_file(self._path(name), data, mode="create", **self._one_put())
        except FileExistsError:
            # Perhaps by this very call: a client that lost the answer asks again by itself.
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
        names = ((posixpath.basename(entry["name"]), entry) for entry in entries)
        return {
            name: entry["size"]
            for name, entry in names
            if entry["type"] == "file" and name.startswith(prefix)
        }

    @retry_transient
    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _one_put(self) -> dict[str, int]:
        return {"chunksize": ONE_PUT_BYTES} if self._is_s3 else {}

    def _in_parts(self) -> dict[str, int]:
        return {"max_concurrency": PARTS_AT_ONCE} if self._is_s3 else {}
