"""Page sizes of a Parquet file from its footer and page headers, without decompressing anything.

A page of a few bytes may decompress to gigabytes; the reader allocates what the page header
states, so the header is checked first. The footer is parsed here as well: pyarrow 26 describes a
column chunk only by an object whose construction ends the process (an exception of C++ that is not
caught) if its histograms of levels are malformed. Reading the pages of such a chunk is harmless.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

HEADER_BYTES = (1 << 10, 1 << 14, 1 << 24)
"""Bytes read for a page header, in increasing steps; other Parquet readers stop at 16 MiB too."""

# Field types of Thrift's compact protocol: the low four bits of a field's first byte.
STOP, TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 12
INTEGERS = (4, 5, 6)

MAX_DEPTH = 12
"""Maximum nesting of structs and lists; a footer has seven levels, a page header three."""

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


def list_chunks(footer: bytes) -> list[list[Chunk]]:
    """List the column chunks of each row group.

    Args:
        footer: The file's `FileMetaData`.

    Raises:
        ValueError: It is no valid footer.
    """
    try:
        fields, _ = _read_struct(footer, 0, MAX_DEPTH)
        return [
            [_describe_chunk(column) for column in _take(group, COLUMNS, list)]
            for group in _take(fields, ROW_GROUPS, list)
        ]
    except (IndexError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError("it has no valid footer") from error


def _describe_chunk(column: Any) -> Chunk:
    fields = _take(column, META_DATA, dict)
    start = _take(fields, DATA_PAGE, int)
    if DICTIONARY_PAGE in fields:
        start = min(start, _take(fields, DICTIONARY_PAGE, int))
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
        columns: The columns to be read, none of them nested.

    Raises:
        ValueError: A page has no valid header.
    """
    sizes = (
        size for chunk in chunks if chunk.column in columns for size in _list_pages(stream, chunk)
    )
    return max(sizes, default=0)


def _list_pages(stream: BinaryIO, chunk: Chunk) -> Iterator[int]:
    """Yield the decompressed bytes of each page of a column chunk."""
    offset, stop = chunk.start, chunk.start + chunk.num_bytes
    while offset < min(stop, MAX_OFFSET):
        unpacked, packed, header = _read_header(stream, offset)
        yield unpacked
        offset += header + packed


def _read_header(stream: BinaryIO, offset: int) -> tuple[int, int, int]:
    """Read a page's decompressed and compressed bytes, and the bytes of its header."""
    for num_bytes in HEADER_BYTES:
        stream.seek(offset)
        data = stream.read(num_bytes)
        try:
            fields, length = _read_struct(data, 0, MAX_DEPTH)
        except IndexError:
            if len(data) < num_bytes:
                break
            continue
        unpacked, packed = fields.get(PAGE_SIZE), fields.get(COMPRESSED_PAGE_SIZE)
        if (
            not isinstance(unpacked, int)
            or not isinstance(packed, int)
            or min(unpacked, packed) < 0
        ):
            break
        return unpacked, packed, length
    raise ValueError(INVALID)


def _read_struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """Read a struct's values by field number, and the offset of its end.

    Raises:
        IndexError: The struct is longer than the data.
        ValueError: It has a field of a type that Parquet does not use, or is nested too deep.
    """
    fields: dict[int, Any] = {}
    number = 0
    while True:
        head, at = data[at], at + 1
        kind, step = head & 15, head >> 4
        if kind == STOP:
            return fields, at
        if step:
            number += step
        else:
            number, at = _read_integer(data, at)
        if kind in (TRUE, FALSE):  # the value is the type
            fields[number] = kind == TRUE
        else:
            fields[number], at = _read_value(data, at, kind, depth)


def _read_value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    """Read a value, and the offset of its end; of a double nothing but the latter."""
    if kind in INTEGERS:
        return _read_integer(data, at)
    if kind in (TRUE, FALSE, BYTE):  # in a list, a truth value takes a byte
        return data[at], at + 1
    if kind == DOUBLE:
        return None, at + 8
    if kind == BINARY:
        length, at = _read_varint(data, at)
        return data[at : at + length], at + length
    if kind == STRUCT and depth:
        return _read_struct(data, at, depth - 1)
    if kind in (LIST, SET) and depth:
        return _read_list(data, at, depth - 1)
    raise ValueError(INVALID)


def _read_list(data: bytes, at: int, depth: int) -> tuple[list[Any], int]:
    head, at = data[at], at + 1
    kind, length = head & 15, head >> 4
    if length == 15:
        length, at = _read_varint(data, at)
    values: list[Any] = []
    for _ in range(length):  # each takes a byte at least, so a false length ends with the data
        value, at = _read_value(data, at, kind, depth)
        if kind in (BINARY, STRUCT):  # nothing here needs the others, which are many
            values.append(value)
    return values, at


def _read_integer(data: bytes, at: int) -> tuple[int, int]:
    raw, at = _read_varint(data, at)
    return (raw >> 1) ^ -(raw & 1), at


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(INVALID)
