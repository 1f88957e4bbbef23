"""The records beside the shards: a run record, one commit record a shard, and the manifest."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayfuse.config.base import UserError
from rayfuse.schema import SCHEMA_VERSION
from rayfuse.storage.seal import REMEDY, ShardError, is_sealed, unseal

RECORDS_FILE = re.compile(r"records-[0-9a-f]{12}\.parquet")

FILES = {
    "commits": re.compile(r"(\d{5,})\.json"),
    "data": re.compile(r"(\d{5,})-[0-9a-f]{12}\.parquet"),
    "rejects": re.compile(r"(\d{5,})\.jsonl"),
}
"""The names of a data set's own files, by subfolder; all others are foreign and ignored: `.nfs...`
of a network file system, `.DS_Store`, copies."""


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
    rejects_sha256: str = ""
    """Of the file of rejects; empty without rejects."""
    text_sha256: str = ""
    """Of the texts, in shards that have them: see `hash_text`."""
    inputs: dict[str, str] = field(default_factory=dict[str, str])
    """What the shard was made from: by stage, the `identity` of its input's commit. Shards that
    were migrated from schema version 4 have none."""

    @property
    def identity(self) -> str:
        """What the shards that are made from this one record as their input.

        Of a corpus the texts alone: recipes with other targets share what was captured.
        """
        return self.text_sha256 or self.sha256


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
        "rejects_sha256": pa.string(),
        "text_sha256": pa.string(),
        "inputs": pa.map_(pa.string(), pa.string()),
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
    content_sha256: str
    """Of the sha256 of all shards, in order: what is made from the entire data set records it."""


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
    """Decode a run record or a manifest: the fingerprint, the schema version and other values.

    Args:
        data: The file's bytes.
        path: Its path or URI, for errors.
        root: The root of its store, for errors.

    Raises:
        ShardError: It is corrupt.
        UserError: It has another schema version.
    """
    if not is_sealed(data):
        _check_unsealed(data, root)
    record = unseal(data, path)
    check_version(record.get("schema_version"), root)
    return record


def _check_unsealed(data: bytes, root: str) -> None:
    """Check that a record without a checksum is not one of schema version 4, which had none."""
    try:
        version = json.loads(data)["schema_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return  # corrupt
    if isinstance(version, int) and version < SCHEMA_VERSION:
        check_version(version, root)


def decode_commit(data: bytes, path: str, shard: int) -> Commit:
    """Decode a shard's commit record.

    Raises:
        ShardError: It is corrupt, the record of another shard, or names another file.
    """
    record = unseal(data, path)
    try:
        commit = Commit(**record)
    except TypeError as error:
        raise ShardError(f"{path} is no commit record ({error}); {REMEDY}") from error
    return check_commit(commit, shard, path)


def check_commit(commit: Commit, shard: int, path: str) -> Commit:
    """Check a commit record's shard and the name of its file, and return the record.

    Files are read and removed by these names, so that a record must not name any other.

    Raises:
        ShardError: It is the record of another shard, or names another file.
    """
    if commit.shard != shard:
        raise ShardError(f"{path} is the record of shard {commit.shard}; {REMEDY}")
    if commit.file != f"data/{shard:05d}-{commit.attempt}.parquet" or (
        parse_shard("data", commit.file.removeprefix("data/")) != shard
    ):
        raise ShardError(
            f"{path} names the file {commit.file!r}, which is no file of shard {shard}; {REMEDY}"
        )
    return commit


def list_changed_inputs(commit: Commit, inputs: Mapping[str, Commit]) -> list[str]:
    """List the inputs, by stage, that a shard was not made from.

    Args:
        commit: The shard's. An input that it has not recorded is not compared.
        inputs: The commits of the shards that there are now, by stage.
    """
    recorded = commit.inputs
    return [
        name for name, now in inputs.items() if recorded.get(name, now.identity) != now.identity
    ]


def check_inputs(commit: Commit, inputs: Mapping[str, Commit], folder: str) -> None:
    """Check that a shard was made from the shards that it is read with.

    Args:
        commit: The shard's.
        inputs: As for `list_changed_inputs`.
        folder: The shard's data set, for errors.

    Raises:
        ShardError: It was made from others.
    """
    for name in list_changed_inputs(commit, inputs):
        raise ShardError(
            f"{folder}: shard {commit.shard} was made from other rows of {name} than there are "
            f"now; {REMEDY}"
        )


def parse_shard(folder: str, name: str) -> int | None:
    """Parse the shard from the name of a file in a data set's subfolder; None for a foreign file.

    Args:
        folder: `commits`, `data` or `rejects`.
        name: The file's name within it.
    """
    found = FILES[folder].fullmatch(name)
    if found is None or name[: found.end(1)] != f"{int(found[1]):05d}":
        return None
    return int(found[1])


def encode_records(commits: Sequence[Commit]) -> bytes:
    """Encode the commit records of a complete data set, sorted by shard, as Parquet."""
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist([asdict(commit) for commit in commits], schema=RECORDS)
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def decode_records(table: pa.Table, path: str) -> list[Commit]:
    """Convert rows of `RECORDS`, which are sorted by shard, to commit records.

    Args:
        table: All commit records of a data set.
        path: The file's path or URI, for errors.

    Raises:
        ShardError: A record is of another shard, or names another file.
    """
    rows = (
        row | {name: dict(row[name]) for name in ("stats", "inputs")} for row in table.to_pylist()
    )
    return [check_commit(Commit(**row), shard, path) for shard, row in enumerate(rows)]


def build_manifest(commits: Sequence[Commit], records_sha256: str) -> Manifest:
    """Build the manifest of a complete data set.

    Args:
        commits: All commit records, sorted by shard.
        records_sha256: Of the file of these records.
    """
    return Manifest(
        num_shards=len(commits),
        rows=sum(commit.rows for commit in commits),
        tokens=sum(commit.tokens for commit in commits),
        rejects=sum(commit.rejects for commit in commits),
        records=f"records-{records_sha256[:12]}.parquet",
        records_sha256=records_sha256,
        content_sha256=hashlib.sha256("".join(c.sha256 for c in commits).encode()).hexdigest(),
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
    record = decode_run(data, path, root)
    try:
        manifest = Manifest(**{key: record[key] for key in Manifest.__dataclass_fields__})
        is_named = RECORDS_FILE.fullmatch(manifest.records) is not None
    except (KeyError, TypeError) as error:
        raise ShardError(f"{path} is no manifest; {REMEDY}") from error
    if not is_named:
        raise ShardError(f"{path} names the records {manifest.records!r}; {REMEDY}")
    return manifest


def hash_text(table: pa.Table) -> str:
    """Hash the texts of a shard: of each row its id, its text, and whether it ends a document.

    That is all that a source reads of a row. The target's tokens are no part of it.
    """
    digest = hashlib.sha256()
    for name in ("row_id", "text"):
        for value in table[name].to_pylist():
            data = value.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
    digest.update(bytes(table["ends_document"].to_pylist()))
    return digest.hexdigest()
