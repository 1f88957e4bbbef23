"""Open a file of documents: local or a URI, plain or compressed, in bounded memory and work."""

import bz2
import gzip
import io
import lzma
import posixpath
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import zstandard

BUFFER_BYTES = 1 << 20

MAX_WINDOW_BYTES = 1 << 31
"""The largest window that `zstd --long` makes. Only what a file fills of it takes memory."""

PACKED_BYTES = 2048
"""Of a zstd file, unpacked at a time: to 64 MiB at most, blocks of 4 bytes being 128 KiB."""

MAX_EXPANSION = 1000
"""Maximum ratio of a file's text to its stored bytes, gzip's own: real text is at 3 to 100. A file
of a few kilobytes could otherwise keep a worker busy for days."""

FREE_BYTES = 4 << 30
"""Text that a file of any size may have."""


class ZstdReader:
    """Decompresses zstd frames; zstandard's own reader takes a cut-off file for complete."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        self.frame: Any = None
        self.unread = memoryview(b"")

    def read(self, num_bytes: int) -> bytes:
        """Read up to `num_bytes`; none at the end.

        Raises:
            EOFError: The file ends within a frame.
            zstandard.ZstdError: It is no zstd.
        """
        while not self.unread:
            packed = self.frame.unused_data if self.frame and self.frame.eof else b""
            packed = packed or self.raw.read(PACKED_BYTES)
            if not packed and (self.frame is None or self.frame.eof):
                return b""
            if not packed:
                raise EOFError("the file ends within a zstd frame")
            if self.frame is None or self.frame.eof:
                unpacker = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
                self.frame = unpacker.decompressobj()
            self.unread = memoryview(self.frame.decompress(packed))
        data, self.unread = self.unread[:num_bytes], self.unread[num_bytes:]
        return bytes(data)


def _open_gzip(raw: Any) -> Any:
    return gzip.GzipFile(fileobj=raw, mode="rb")


UNPACKERS: dict[str, Callable[[Any], Any]] = {
    ".gz": _open_gzip,
    ".zst": ZstdReader,
    ".zstd": ZstdReader,
    ".xz": lzma.LZMAFile,
    ".bz2": bz2.BZ2File,
}
"""What opens a compressed file, by the suffix of its name."""

UNPACK_ERRORS = (EOFError, lzma.LZMAError, zstandard.ZstdError)
"""Errors for a corrupt file besides OSError and ValueError; `zlib.error` is zlib's own."""


def split_name(path: str) -> tuple[str, str, str]:
    """Split a file's base name into stem, suffix and suffix of the compression, in lower case."""
    name = posixpath.basename(path)
    stem, packed = posixpath.splitext(name)
    if packed.lower() not in UNPACKERS:
        stem, packed = name, ""
    stem, suffix = posixpath.splitext(stem)
    return stem.lower(), suffix.lower(), packed.lower()


def max_text_bytes(num_bytes: int) -> int:
    """Compute how much text a file may have.

    Args:
        num_bytes: Its size as stored.
    """
    return FREE_BYTES + MAX_EXPANSION * num_bytes


@contextmanager
def open_input(path: str, num_bytes: int) -> Iterator[Any]:
    """Open a local file or URI as bytes, decompressed if its name has such a suffix.

    Args:
        path: Of the file.
        num_bytes: Its size as stored.

    Yields:
        An `io.BufferedReader`. Its reads raise ValueError, OSError or one of `UNPACK_ERRORS` if the
        file is corrupt or unpacks to more than `max_text_bytes`.
    """
    unpack = UNPACKERS.get(split_name(path)[2])
    with _open_raw(path) as raw:
        if unpack is None:
            yield raw
        else:
            unpacked = LimitedReader(unpack(raw), max_text_bytes(num_bytes))
            with io.BufferedReader(unpacked, BUFFER_BYTES) as stream:
                yield stream


def _open_raw(path: str) -> Any:
    if "://" not in path:
        return open(path, "rb", BUFFER_BYTES)
    fs, name = fsspec.url_to_fs(path)
    # The buffer adds `readline(size)`: fsspec's own files read lines of any length.
    return io.BufferedReader(fs.open(name, "rb"), BUFFER_BYTES)


class LimitedReader(io.RawIOBase):
    """The bytes of a stream, and an error if there are too many."""

    def __init__(self, stream: Any, max_bytes: int) -> None:
        self.stream = stream
        self.max_bytes = max_bytes
        self.num_bytes = 0

    def readable(self) -> bool:
        """Declare to `io.BufferedReader` that this can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer.

        Raises:
            ValueError: There are more bytes than `max_bytes`, or the zstd window is too large.
        """
        try:
            data = self.stream.read(len(buffer))
        except zstandard.ZstdError as error:
            if "memory" not in str(error):
                raise
            raise ValueError(
                f"its zstd window is larger than {MAX_WINDOW_BYTES} bytes; compress it again with "
                "zstd --long=31 or less"
            ) from error
        self.num_bytes += len(data)
        if self.num_bytes > self.max_bytes:
            raise ValueError(
                f"it unpacks to more than {self.max_bytes} bytes, over {MAX_EXPANSION} times its "
                "size"
            )
        buffer[: len(data)] = data
        return len(data)
