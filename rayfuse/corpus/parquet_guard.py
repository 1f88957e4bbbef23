"""Page sizes of a Parquet file from its footer and page headers, without decompressing anything.

A page of a few bytes may decompress to gigabytes; the reader allocates what the page header
states, so the header is checked first. The footer is parsed here as well: pyarrow 26 describes a
column chunk only by an object whose construction ends the process (an exception of C++ that is not
caught) if its histograms of levels are malformed. Reading the pages of such a chunk is harmless.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

HEADER_BYTES = (1 << 10, 1 << 14, 1 << 24)
"""Bytes read for a page header, in increasing steps; other Parquet readers stop at 16 MiB too."""

# Field types of Thrift's compact protocol: the low four bits of a field's first byte.
STOP, TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 12
INTEGERS = (4, 5, 6)

MAX_DEPTH = 12
"""Maximum nesting of structs and lists; a footer has seven levels, a page header three."""

MAX_VALUES = 2_000_000
"""Maximum structs and texts in a footer: a hundred thousand column chunks; each takes memory."""

MAX_HEADER_VALUES = 1000
"""Maximum structs and texts in a page header, which has a handful."""

MAX_PAGE_BYTES = 2**31
"""Sizes in page headers are 32-bit numbers: a reader ignores what is above."""

PADDED = re.compile(r"parquet-mr version 1\.[0-2]\.")
"""Writers whose chunks may be larger than their footer states, by the header of a dictionary."""

PADDING_BYTES = 100
"""Bytes behind a chunk of such a writer in which readers look for another page."""

MAX_OFFSET = 2**62
"""Above every place in a file; the numbers of a page header may still add up beyond it."""

INVALID = "a page has no valid header"

# Field numbers of Parquet's structs (parquet.thrift).
ROW_GROUPS, COLUMNS, META_DATA = 4, 1, 3
PATH, COMPRESSED_SIZE, DATA_PAGE, DICTIONARY_PAGE = 3, 7, 9, 11
PAGE_SIZE, COMPRESSED_PAGE_SIZE = 2, 3


@dataclass(frozen=True)
class Chunk:
    """The pages of one column in one row group."""

    column: str
    """Its path in the schema, parts joined by dots."""
    start: int
    """Where the first page begins in the file."""
    num_bytes: int
    padding: int = 0
    """Bytes behind them that a reader may take for another page."""


def list_chunks(footer: bytes, paths: Sequence[str], created_by: str) -> list[list[Chunk]]:
    """List the column chunks of each row group.

    Args:
        footer: The file's `FileMetaData`.
        paths: The columns of its schema in order: readers know a chunk by its place alone.
        created_by: The name of its writer.

    Raises:
        ValueError: It is no valid footer.
    """
    try:
        fields = _Parser(footer, MAX_VALUES).read_struct()
        groups = [
            [_describe_chunk(column) for column in _take(group, COLUMNS, list)]
            for group in _take(fields, ROW_GROUPS, list)
        ]
    except (IndexError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError("it has no valid footer") from error
    if any([chunk.column for chunk in group] != list(paths) for group in groups):
        raise ValueError("the columns of its row groups are not those of its schema")
    padding = PADDING_BYTES if PADDED.match(created_by) else 0
    return [[replace(chunk, padding=padding) for chunk in group] for group in groups]


def _describe_chunk(column: Any) -> Chunk:
    fields = _take(column, META_DATA, dict)
    start = _take(fields, DATA_PAGE, int)
    dictionary = fields.get(DICTIONARY_PAGE, 0)
    if isinstance(dictionary, int) and dictionary > 0:  # others are none, as for other readers
        start = min(start, dictionary)
    path = b".".join(_take(fields, PATH, list))
    num_bytes = _take(fields, COMPRESSED_SIZE, int)
    if not 0 <= start <= start + num_bytes < MAX_OFFSET:
        raise ValueError("it has no valid footer")
    return Chunk(path.decode(), start, num_bytes)


def _take(fields: Any, number: int, kind: type) -> Any:
    """Look up a field of a struct.

    Raises:
        TypeError: It has another type.
    """
    value = fields[number]
    if not isinstance(value, kind):
        raise TypeError(f"field {number} is a {type(value).__name__}")
    return value


def find_largest_page(stream: BinaryIO, chunks: Collection[Chunk], columns: Collection[str]) -> int:
    """Find the decompressed bytes of a row group's largest page, by the page headers.

    The sums in the file's footer are not used: a reader allocates what the page header states.

    Args:
        stream: The Parquet file.
        chunks: The row group's.
        columns: The columns to be read; of nested ones, the paths of their leaves.

    Raises:
        ValueError: A page has no valid header.
    """
    sizes = (
        size for chunk in chunks if chunk.column in columns for size in _list_pages(stream, chunk)
    )
    return max(sizes, default=0)


def _list_pages(stream: BinaryIO, chunk: Chunk) -> Iterator[int]:
    """Yield the decompressed bytes of each page of a column chunk.

    Raises:
        ValueError: A page has no valid header, or ends outside the chunk.
    """
    offset, stop = chunk.start, chunk.start + chunk.num_bytes
    while offset < stop:
        unpacked, packed, header = _read_header(stream, offset)
        yield unpacked
        offset += header + packed
    if offset != stop:
        raise ValueError("a page ends outside its column")
    while offset < stop + chunk.padding:
        try:
            unpacked, packed, header = _read_header(stream, offset)
        except ValueError:
            return
        yield unpacked
        offset += header + packed


def _read_header(stream: BinaryIO, offset: int) -> tuple[int, int, int]:
    """Read a page's decompressed and compressed bytes, and the bytes of its header."""
    for num_bytes in HEADER_BYTES:
        stream.seek(offset)
        data = stream.read(num_bytes)
        parser = _Parser(data, MAX_HEADER_VALUES)
        try:
            fields = parser.read_struct()
        except IndexError:
            if len(data) < num_bytes:
                break
            continue
        unpacked, packed = fields.get(PAGE_SIZE), fields.get(COMPRESSED_PAGE_SIZE)
        if not isinstance(unpacked, int) or not isinstance(packed, int):
            break
        if not (0 <= unpacked < MAX_PAGE_BYTES and 0 <= packed < MAX_PAGE_BYTES):
            break
        return unpacked, packed, parser.at
    raise ValueError(INVALID)


class _Parser:
    """Reads Thrift's compact protocol."""

    def __init__(self, data: bytes, max_values: int) -> None:
        self.data, self.at, self.room = data, 0, max_values

    def read_struct(self, depth: int = MAX_DEPTH) -> dict[int, Any]:
        """Read a struct's values by field number.

        Raises:
            IndexError: The struct is longer than the data.
            ValueError: It has a field twice (readers differ in which one counts) or of a type that
                Parquet does not use, too many values, or is nested too deep.
        """
        fields: dict[int, Any] = {}
        number = 0
        while True:
            head = self._take_byte()
            kind, step = head & 15, head >> 4
            if kind == STOP:
                return fields
            number = number + step if step else self._read_integer()
            if number in fields:
                raise ValueError(INVALID)
            if kind in (TRUE, FALSE):  # the value is the type
                fields[number] = kind == TRUE
            else:
                fields[number] = self._read_value(kind, depth)

    def _read_value(self, kind: int, depth: int) -> Any:
        """Read a value; of a double nothing is kept."""
        if kind in INTEGERS:
            return self._read_integer()
        if kind in (TRUE, FALSE, BYTE):  # in a list, a truth value takes a byte
            return self._take_byte()
        if kind == DOUBLE:
            return self._take_bytes(8) and None
        if kind == BINARY:
            return self._take_bytes(self._read_varint())
        if kind == STRUCT and depth:
            self._count_value()
            return self.read_struct(depth - 1)
        if kind in (LIST, SET) and depth:
            return self._read_list(depth - 1)
        raise ValueError(INVALID)

    def _read_list(self, depth: int) -> list[Any]:
        head = self._take_byte()
        kind, length = head & 15, head >> 4
        if length == 15:
            length = self._read_varint()
        values: list[Any] = []
        for _ in range(length):  # each takes a byte at least, so a false length ends with the data
            value = self._read_value(kind, depth)
            if kind in (BINARY, STRUCT):  # nothing here needs the others, which are many
                values.append(value)
        return values

    def _count_value(self) -> None:
        self.room -= 1
        if self.room < 0:
            raise ValueError("its footer has too many parts")

    def _take_byte(self) -> int:
        byte = self.data[self.at]
        self.at += 1
        return byte

    def _take_bytes(self, length: int) -> bytes:
        self._count_value()
        taken = self.data[self.at : self.at + length]
        if len(taken) < length:
            raise IndexError
        self.at += length
        return taken

    def _read_integer(self) -> int:
        raw = self._read_varint()
        return (raw >> 1) ^ -(raw & 1)

    def _read_varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._take_byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError(INVALID)
