"""A data set: numbered shards, each counting once its commit record is there."""

import hashlib
import json
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayfuse.schema import SCHEMA_VERSION
from rayfuse.storage.store import Store

# Columns whose small, repeating values (differences of codes) a dictionary packs best; every other
# list column is split into byte planes, which a dictionary left on would silently switch off.
DICTIONARY_COLUMNS = ("top_logprobs",)


class ShardError(ValueError):
    """A shard is missing or is not what its commit record says."""


@dataclass(frozen=True)
class Commit:
    """The record that makes a shard count."""

    shard: int
    file: str
    num_bytes: int
    sha256: str
    rows: int
    tokens: int
    rejects: int
    attempt: str
    stats: dict[str, float] = field(default_factory=dict[str, float])
    """Sums over the shard that reports add up."""


@dataclass(frozen=True)
class Reject:
    """A row or document that could not be used."""

    name: str
    reason: str


@dataclass(frozen=True)
class DataSet:
    """Numbered Parquet shards in a folder of a store."""

    store: Store
    folder: str
    fingerprint: str
    """Hash of all that decides what the shards hold."""

    def claim(self, run: dict[str, Any]) -> None:
        """Write down, once, what this data set is made from.

        Raises:
            ValueError: The folder was made from something else.
        """
        record = {"fingerprint": self.fingerprint, "schema_version": SCHEMA_VERSION} | run
        if self.store.create(f"{self.folder}/run.json", _to_json(record)):
            return
        found = json.loads(self.store.read(f"{self.folder}/run.json"))
        if found.get("fingerprint") != self.fingerprint:
            raise ValueError(
                f"{self.store.root}/{self.folder} belongs to a run with fingerprint "
                f"{found.get('fingerprint')}, not {self.fingerprint}; give another storage"
            )

    def read_run(self) -> dict[str, Any]:
        """Return what `claim` wrote down.

        Raises:
            FileNotFoundError: Nothing has claimed the data set yet.
        """
        return json.loads(self.store.read(f"{self.folder}/run.json"))

    def write_shard(
        self,
        shard: int,
        table: pa.Table,
        *,
        tokens: int,
        rejects: Iterable[Reject] = (),
        stats: dict[str, float] | None = None,
    ) -> Commit:
        """Store a table as a shard and commit it; the first commit of a shard wins.

        Returns:
            The commit that counts: this one, or the one that was there first.
        """
        attempt = uuid.uuid4().hex[:12]
        data = encode_table(table, self.fingerprint)
        rejected = [asdict(reject) for reject in rejects]
        commit = Commit(
            shard=shard,
            file=f"data/{shard:05d}-{attempt}.parquet",
            num_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            rows=table.num_rows,
            tokens=tokens,
            rejects=len(rejected),
            attempt=attempt,
            stats=stats or {},
        )
        self.store.write(f"{self.folder}/{commit.file}", data)
        if rejected:
            lines = "".join(json.dumps(reject) + "\n" for reject in rejected)
            self.store.write(f"{self.folder}/rejects/{shard:05d}.jsonl", lines.encode())
        if self.store.create(self._commit_name(shard), _to_json(asdict(commit))):
            return commit
        winner = Commit(**json.loads(self.store.read(self._commit_name(shard))))
        if winner.attempt != attempt:  # else: ours, and only the answer was lost
            self.store.remove(f"{self.folder}/{commit.file}")
        return winner

    def read_shard(self, commit: Commit, columns: list[str] | None = None) -> pa.Table:
        """Return a committed shard, checked against its record and its page checksums.

        Raises:
            ShardError: The shard is missing, or is not the one that was committed.
        """
        name = f"{self.store.root}/{self.folder}/{commit.file}"
        try:
            data = self.store.read(f"{self.folder}/{commit.file}")
        except FileNotFoundError as error:
            raise ShardError(f"{name} is gone; run the stage again to make it again") from error
        if hashlib.sha256(data).hexdigest() != commit.sha256:
            raise ShardError(
                f"{name} is not what was committed ({len(data)} bytes, sha256 differs); "
                "delete it and run the stage again"
            )
        reader = pa.BufferReader(data)
        return pq.read_table(reader, columns=columns, page_checksum_verification=True)

    def read_commit(self, shard: int) -> Commit:
        """Return one shard's commit record.

        Raises:
            ShardError: The shard is not committed.
        """
        try:
            return Commit(**json.loads(self.store.read(self._commit_name(shard))))
        except FileNotFoundError as error:
            raise ShardError(f"{self.folder}: shard {shard} is not committed") from error

    def commits(self) -> dict[int, Commit]:
        """Return the commit records by shard: the manifest's, or the single ones without it."""
        manifest = self.read_manifest()
        if manifest is not None:
            return {record["shard"]: Commit(**record) for record in manifest["commits"]}
        names = self.store.sizes(f"{self.folder}/commits")
        records = (json.loads(self.store.read(f"{self.folder}/commits/{name}")) for name in names)
        commits = (Commit(**record) for record in records)
        return {commit.shard: commit for commit in sorted(commits, key=lambda c: c.shard)}

    def read_manifest(self) -> dict[str, Any] | None:
        """Return the manifest, or nothing while the data set is not whole."""
        try:
            return json.loads(self.store.read(f"{self.folder}/manifest.json"))
        except FileNotFoundError:
            return None

    def drop_lost_shards(self) -> list[int]:
        """Forget commits whose file is gone or has another size, and return their shards."""
        commits = self.commits()
        sizes = self.store.sizes(f"{self.folder}/data")
        lost = [
            commit.shard
            for commit in commits.values()
            if sizes.get(commit.file.removeprefix("data/")) != commit.num_bytes
        ]
        if lost:
            self.store.remove(f"{self.folder}/manifest.json")
        for shard in lost:
            self.store.remove(self._commit_name(shard))
        return lost

    def finish(self, num_shards: int) -> None:
        """Write the manifest of a data set that is whole.

        Raises:
            ShardError: Shards are missing.
        """
        if self.read_manifest() is not None:
            return
        commits = self.commits()
        missing = sorted(set(range(num_shards)) - set(commits))
        if missing:
            raise ShardError(f"{self.folder}: {len(missing)} shards missing, first {missing[0]}")
        run = self.read_run()
        records = [asdict(commit) for commit in commits.values()]
        self.store.write(f"{self.folder}/manifest.json", _to_json(run | {"commits": records}))

    def is_whole(self) -> bool:
        """Return whether every shard is committed and its file is there."""
        manifest = self.read_manifest()
        if manifest is None:
            return False
        sizes = self.store.sizes(f"{self.folder}/data")
        return all(
            sizes.get(record["file"].removeprefix("data/")) == record["num_bytes"]
            for record in manifest["commits"]
        )

    def _commit_name(self, shard: int) -> str:
        return f"{self.folder}/commits/{shard:05d}.json"


def encode_table(table: pa.Table, fingerprint: str) -> bytes:
    """Return a table as Parquet: byte planes for lists of numbers, zstd, page checksums."""
    table = table.replace_schema_metadata(
        {"rayfuse.schema_version": str(SCHEMA_VERSION), "rayfuse.fingerprint": fingerprint}
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


def fingerprint_of(**parts: Any) -> str:
    """Return a short hash of all that decides a result, from plain JSON values."""
    text = json.dumps(parts | {"schema_version": SCHEMA_VERSION}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _to_json(record: dict[str, Any]) -> bytes:
    return json.dumps(record, indent=1, sort_keys=True).encode()
