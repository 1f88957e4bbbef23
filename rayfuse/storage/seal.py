"""JSON records that carry their own checksum: no changed bit is ever taken for content."""

import hashlib
import json
from typing import Any

from rayfuse.config.base import first_line

SEAL = "record_sha256"
"""The key of a record's checksum: the SHA-256 of the record without it, as `encode_json` writes."""

REMEDY = "run `rayfuse verify --repair`, which writes it again"


class ShardError(RuntimeError):
    """A shard, a record or another stored result is missing or corrupt."""


def encode_json(record: dict[str, Any], indent: int | None = 1) -> bytes:
    """Encode a record as JSON with sorted keys: equal records have equal bytes."""
    return json.dumps(record, indent=indent, sort_keys=True).encode()


def seal(record: dict[str, Any], indent: int | None = 1) -> bytes:
    """Encode a record with its checksum; without an indent as one line."""
    digest = hashlib.sha256(encode_json(record, indent)).hexdigest()
    return encode_json(record | {SEAL: digest}, indent)


def is_sealed(data: bytes) -> bool:
    """Check whether a record has a checksum, which may be wrong."""
    return f'"{SEAL}":'.encode() in data


def unseal(data: bytes, path: str, indent: int | None = 1) -> dict[str, Any]:
    """Decode a record and check every byte of it.

    Args:
        data: The bytes of the file, or of the line.
        path: The file's path or URI, for errors.
        indent: As it was sealed.

    Raises:
        ShardError: It is not what `seal` wrote.
    """
    try:
        record: dict[str, Any] = json.loads(data)
        del record[SEAL]
        # Sealing it again gives the same bytes, so spelling and order are checked as well.
        is_intact = seal(record, indent) == data
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ShardError(
            f"{path} is no record with a checksum ({type(error).__name__}: {first_line(error)}); "
            f"{REMEDY}"
        ) from error
    if not is_intact:
        raise ShardError(f"{path} is corrupt: its checksum differs; {REMEDY}")
    return record
