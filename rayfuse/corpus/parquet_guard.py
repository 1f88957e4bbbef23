"""How large the pages of a Parquet file are, from their headers: nothing is unpacked to know it."""

from collections.abc import Iterator
from typing import Any, BinaryIO

HEADER_BYTES = (1 << 10, 1 << 14, 1 << 24)
"""How much is read for a page's header, in turn; readers of Parquet stop at 16 MiB as well."""

# Thrift's compact protocol: what the low four bits of a field's first byte say.
STOP, TRUE, FALSE, BYTE, DOUBLE, BINARY, STRUCT = 0, 1, 2, 3, 7, 8, 12
INTEGERS = (4, 5, 6)

DEEPEST = 8
"""Structs within structs; a page header has three."""


def find_largest_page(stream: BinaryIO, metadata: Any, group: int, columns: list[str]) -> int:
    """Return the bytes of a row group's largest page, unpacked, as its own header has them.

    The footer's sums are not asked: what a reader allocates is what the page's header says.

    Args:
        stream: The Parquet file.
        metadata: Its `pq.FileMetaData`.
        group: The row group.
        columns: The columns that will be read, none of them nested.

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
    """Yield the unpacked bytes of each page of a column chunk."""
    place = chunk.data_page_offset
    if chunk.has_dictionary_page:
        place = min(place, chunk.dictionary_page_offset)
    stop = place + chunk.total_compressed_size
    while place < stop:
        unpacked, packed, header = _read_header(stream, place)
        yield unpacked
        place += header + packed


def _read_header(stream: BinaryIO, place: int) -> tuple[int, int, int]:
    """Return a page's unpacked and packed bytes, and those of its header."""
    for num_bytes in HEADER_BYTES:
        stream.seek(place)
        data = stream.read(num_bytes)
        try:
            fields, length = _read_struct(data, 0, DEEPEST)
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
    """Return a struct's integers by field number, and where it ends.

    Raises:
        IndexError: It goes on behind the data.
        ValueError: It holds what no page header does.
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
    """Return where a value that is no integer ends."""
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
