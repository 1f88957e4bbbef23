"""The records beside the shards: a run record, one commit record a shard, and the manifest."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayfuse.config.base import UserError
from rayfuse.schema import SCHEMA_VERSION

REMEDY = "run `rayfuse verify --repair`, which writes it again"


class ShardError(RuntimeError):
    """A shard or a record of a data set is missing or corrupt."""


@dataclass(frozen=True)
class Commit:
    """The record that makes a shard part of its data set."""

    shard: int
    file: str
    """Below the data set's folder."""
    num_bytes: int
    sha256: str
    rows: int
    tokens: int
    rejects: int
    attempt: str
    stats: dict[str, float] = field(default_factory=dict[str, float])
    """Sums over the shard, which reports add up; in captured shards also when its work began."""
    worker: str = ""
    """The worker that wrote it, where it is known."""


RECORDS = pa.schema(
    {
        "shard": pa.int64(),
        "file": pa.string(),
        "num_bytes": pa.int64(),
        "sha256": pa.string(),
        "rows": pa.int64(),
        "tokens": pa.int64(),
        "rejects": pa.int64(),
        "attempt": pa.string(),
        "stats": pa.map_(pa.string(), pa.float64()),
        "worker": pa.string(),
    }
)
"""The commit records of a complete data set, one a row."""


@dataclass(frozen=True)
class Manifest:
    """Totals of a complete data set. The commit records lie beside it, in Parquet: a million of
    them would be a gigabyte of JSON."""

    num_shards: int
    rows: int
    tokens: int
    rejects: int
    records: str
    """The file of all commit records, sorted by shard."""
    records_sha256: str


def encode_json(record: dict[str, Any]) -> bytes:
    """Encode a record as JSON with sorted keys: equal records have equal bytes."""
    return json.dumps(record, indent=1, sort_keys=True).encode()


def check_version(version: object, root: str) -> None:
    """Check that records or shards have this package's schema version.

    Args:
        version: The version that was read; of schema versions, integers.
        root: The root of the store that it was read from.

    Raises:
        UserError: They have another version.
    """
    if version == SCHEMA_VERSION:
        return
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UserError(
            f"storage {root} has schema version {version}, but this version of rayfuse reads only "
            f"{SCHEMA_VERSION}; upgrade rayfuse"
        )
    raise UserError(
        f"storage {root} has schema version {version}, but this version of rayfuse reads only "
        f"{SCHEMA_VERSION}; run `rayfuse migrate {root}` once"
    )


def decode_run(data: bytes, path: str, root: str) -> dict[str, Any]:
    """Decode a run record: the schema version, the fingerprint and what `claim` was given.

    Args:
        data: The file's bytes.
        path: Its path or URI, for errors.
        root: The root of its store, for errors.

    Raises:
        ShardError: It is corrupt.
        UserError: It has another schema version.
    """
    try:
        record = json.loads(data)
        version = record["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is no run record ({error!r}); {REMEDY}") from error
    check_version(version, root)
    return record


def decode_commit(data: bytes, path: str, shard: int) -> Commit:
    """Decode a shard's commit record.

    Raises:
        ShardError: It is corrupt, or the record of another shard.
    """
    try:
        commit = Commit(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise ShardError(f"{path} is no commit record ({error}); {REMEDY}") from error
    if commit.shard != shard:
        raise ShardError(f"{path} is the record of shard {commit.shard}; {REMEDY}")
    return commit


def encode_records(commits: Sequence[Commit]) -> bytes:
    """Encode the commit records of a complete data set, sorted by shard, as Parquet."""
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist([asdict(commit) for commit in commits], schema=RECORDS)
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def decode_records(table: pa.Table) -> list[Commit]:
    """Convert rows of `RECORDS` to commit records."""
    return [Commit(**record | {"stats": dict(record["stats"])}) for record in table.to_pylist()]


def build_manifest(commits: Sequence[Commit], records: bytes) -> Manifest:
    """Build the manifest of a complete data set.

    Args:
        commits: All commit records.
        records: The same ones, encoded.
    """
    sha256 = hashlib.sha256(records).hexdigest()
    return Manifest(
        num_shards=len(commits),
        rows=sum(commit.rows for commit in commits),
        tokens=sum(commit.tokens for commit in commits),
        rejects=sum(commit.rejects for commit in commits),
        records=f"records-{sha256[:12]}.parquet",
        records_sha256=sha256,
    )


def decode_manifest(data: bytes, path: str, root: str) -> Manifest:
    """Decode a manifest.

    Args:
        data: The file's bytes.
        path: Its path or URI, for errors.
        root: The root of its store, for errors.

    Raises:
        ShardError: It is corrupt.
        UserError: It has another schema version.
    """
    try:
        record = json.loads(data)
        version = record["schema_version"]
        manifest = Manifest(**{key: record[key] for key in Manifest.__dataclass_fields__})
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is no manifest; {REMEDY}") from error
    check_version(version, root)
    return manifest
