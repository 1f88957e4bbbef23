"""Page sizes of a Parquet file from the page headers, without decompressing anything.

A page of a few bytes may decompress to gigabytes; the reader allocates what the page header
states, so the header is checked first.
"""

from collections.abc import Iterator
from typing import Any, BinaryIO

HEADER_BYTES = (1 << 10, 1 << 14, 1 << 24)
"""Bytes read for a page header, in increasing steps; other Parquet readers stop at 16 MiB too."""

# Field types of Thrift's compact protocol: the low four bits of a field's first byte.
STOP, TRUE, FALSE, BYTE, DOUBLE, BINARY, STRUCT = 0, 1, 2, 3, 7, 8, 12
INTEGERS = (4, 5, 6)

MAX_DEPTH = 8
"""Maximum nesting of structs; a page header has three levels."""


def find_largest_page(stream: BinaryIO, metadata: Any, group: int, columns: list[str]) -> int:
    """Find the decompressed bytes of a row group's largest page, by the page headers.

    The sums in the file's footer are not used: a reader allocates what the page header states.

    Args:
        stream: The Parquet file.
        metadata: Its `pq.FileMetaData`.
        group: The row group.
        columns: The columns to be read, none of them nested.

    Raises:
        ValueError: A page has no valid header.
    """
    row_group = metadata.row_group(group)
    chunks = (row_group.column(index) for index in range(row_group.num_columns))
    return max(
        (
            size
            for chunk in chunks
            if chunk.path_in_schema in columns
            for size in _list_pages(stream, chunk)
        ),
        default=0,
    )


def _list_pages(stream: BinaryIO, chunk: Any) -> Iterator[int]:
    """Yield the decompressed bytes of each page of a column chunk."""
    offset = chunk.data_page_offset
    if chunk.has_dictionary_page:
        offset = min(offset, chunk.dictionary_page_offset)
    stop = offset + chunk.total_compressed_size
    while offset < stop:
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
        unpacked, packed = fields.get(2, -1), fields.get(3, -1)
        if unpacked < 0 or packed < 0:
            break
        return unpacked, packed, length
    raise ValueError("a page has no valid header")


def _read_struct(data: bytes, at: int, depth: int) -> tuple[dict[int, int], int]:
    """Read a struct's integers by field number, and the offset of its end.

    Raises:
        IndexError: The struct is longer than the data.
        ValueError: It has a field that no page header has.
    """
    fields: dict[int, int] = {}
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
        if kind in INTEGERS:
            fields[number], at = _read_integer(data, at)
        else:
            at = _skip_value(data, at, kind, depth)


def _skip_value(data: bytes, at: int, kind: int, depth: int) -> int:
    """Find the offset after a value that is not an integer."""
    if kind in (TRUE, FALSE):
        return at
    if kind == BYTE:
        return at + 1
    if kind == DOUBLE:
        return at + 8
    if kind == BINARY:
        length, at = _read_varint(data, at)
        return at + length
    if kind == STRUCT and depth:
        return _read_struct(data, at, depth - 1)[1]
    raise ValueError("a page has no valid header")


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
    raise ValueError("a page has no valid header")
