"""A shard's table as Parquet bytes, with its data set's fingerprint in the metadata."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayfuse.schema import SCHEMA_VERSION

# Columns of small, repeating values (differences of codes), which a dictionary packs best. Every
# other list column is split into byte planes, which pyarrow silently skips if a dictionary is on.
DICTIONARY_COLUMNS = ("top_logprobs",)


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


def decode_origin(data: bytes) -> tuple[str, int, int]:
    """Read the fingerprint, the shard number and the schema version from a shard's metadata."""
    metadata = pq.read_schema(pa.BufferReader(data)).metadata or {}
    fingerprint = metadata.get(b"rayfuse.fingerprint", b"").decode()
    shard = int(metadata.get(b"rayfuse.shard", b"-1"))
    return fingerprint, shard, int(metadata.get(b"rayfuse.schema_version", b"-1"))
