"""Parquet: every file is read by its storage types; a shard has its origin in the metadata."""

import os
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from rayfuse.schema import SCHEMA_VERSION

# Columns of small, repeating values (differences of codes), which a dictionary packs best. Every
# other list column is split into byte planes, which pyarrow silently skips if a dictionary is on.
DICTIONARY_COLUMNS = ("top_logprobs",)

MAX_FOOTER_BYTES = 256 << 20
"""Enough for a million column chunks, and small enough to be copied in memory."""

_MAGIC = b"PAR1"
_ARROW_SCHEMA_KEY = b"ARROW:schema"
_IGNORED_KEY = b"ARROW.schema"  # as many bytes: the footer states their number


def encode_table(
    table: pa.Table, fingerprint: str, shard: int, *, version: int = SCHEMA_VERSION
) -> bytes:
    """Encode a table as Parquet: byte planes for lists of numbers, zstd, page checksums."""
    table = table.replace_schema_metadata(
        {
            "rayfuse.schema_version": str(version),
            "rayfuse.fingerprint": fingerprint,
            "rayfuse.shard": str(shard),
        }
    )
    lists = [field.name for field in table.schema if pa.types.is_list(field.type)]
    split = [
        f"{name}.list.element"
        for name in lists
        if name not in DICTIONARY_COLUMNS
        and not pa.types.is_boolean(table.schema.field(name).type.value_type)
    ]
    encodings: Any = {  # the type stubs know no lists of columns here
        "use_dictionary": [f"{name}.list.element" for name in lists if name in DICTIONARY_COLUMNS],
        "use_byte_stream_split": split,
    }
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=256,
        compression="zstd",
        compression_level=1,
        write_page_checksum=True,
        **encodings,
    )
    return sink.getvalue().to_pybytes()


def open_parquet(stream: BinaryIO | pa.NativeFile, **options: Any) -> pq.ParquetFile:
    """Open a Parquet file with every column, nested ones too, in its storage type.

    A file may hold an Arrow schema beside its own. That schema can name extension types, and the
    library that has registered such a type in this process would then run code on the file's
    content; Ray's type of Python objects unpickles it. Arrow finds the schema by its key, so the
    key is changed in the copy of the footer that is read.

    Args:
        stream: The file, which must be seekable.
        options: For `pq.ParquetFile`.

    Raises:
        ValueError: It is no Parquet file.
    """
    footer = read_footer(stream).replace(_ARROW_SCHEMA_KEY, _IGNORED_KEY)
    tail = len(footer).to_bytes(4, "little") + _MAGIC
    metadata = pq.read_metadata(pa.BufferReader(_MAGIC + footer + tail))
    stream.seek(0)
    return pq.ParquetFile(stream, metadata=metadata, arrow_extensions_enabled=False, **options)


def read_footer(stream: BinaryIO | pa.NativeFile) -> bytes:
    """Read the footer of a Parquet file: its `FileMetaData`.

    Raises:
        ValueError: It is no Parquet file.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(size - len(_MAGIC) - 4, 0))
    tail = stream.read()
    footer_bytes = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or footer_bytes > size - len(tail):
        raise ValueError("it does not end in a Parquet footer")
    if footer_bytes > MAX_FOOTER_BYTES:
        raise ValueError(f"its footer has {footer_bytes} bytes, more than {MAX_FOOTER_BYTES}")
    stream.seek(size - len(tail) - footer_bytes)
    return stream.read(footer_bytes)


def read_parquet(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """Read a table, or some of its columns, from Parquet bytes; see `open_parquet`.

    Raises:
        ValueError: They are no Parquet file, or corrupt.
        KeyError: A column is missing.
    """
    table = open_parquet(pa.BufferReader(data)).read(columns)
    return table if columns is None else table.select(columns)


def decode_origin(data: bytes) -> tuple[str, int, int]:
    """Read the fingerprint, the shard number and the schema version from a shard's metadata."""
    metadata = pq.read_metadata(pa.BufferReader(data)).metadata or {}
    fingerprint = metadata.get(b"rayfuse.fingerprint", b"").decode()
    shard = int(metadata.get(b"rayfuse.shard", b"-1"))
    return fingerprint, shard, int(metadata.get(b"rayfuse.schema_version", b"-1"))
