"""A data set: numbered shards, each counting once its commit record is there."""

import hashlib
import json
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayfuse.runtime.logging import log_event
from rayfuse.schema import SCHEMA_VERSION
from rayfuse.storage.parquet import decode_origin, encode_table
from rayfuse.storage.store import Store

REMEDY = "run `rayfuse verify --repair`, which makes it again"

NUM_READERS = 32
"""Small records that are read, or parts of a folder that are listed, at a time."""

MANY_SHARDS = 20_000

MAX_BLOCKS = 4096
"""Blocks of shard numbers in a Ray Data stream: the driver holds one object per block."""


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
    """Sums over the shard that reports add up; in captured shards also when its work began."""
    worker: str = ""
    """Who made it, where that is told."""


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
"""The commit records of a whole data set, one a row."""


@dataclass(frozen=True)
class Manifest:
    """What a whole data set holds. The records lie beside it, in Parquet: a million of them would
    be a gigabyte of JSON."""

    num_shards: int
    rows: int
    tokens: int
    rejects: int
    records: str
    """The file of all commit records, sorted by shard."""
    records_sha256: str


@dataclass(frozen=True)
class Reject:
    """A row or document that could not be used."""

    name: str
    reason: str


@dataclass(frozen=True)
class DataSet:
    """Numbered Parquet shards in a folder of a store."""

    store: Store
    stage: str
    """What its rows are: `corpus`, `captured`, `aligned`, or `evaluate`."""
    name: str
    """Its name within the stage, such as the source's; empty where the stage has one data set."""
    fingerprint: str
    """Hash of all settings and inputs that decide the shards' content."""

    @property
    def folder(self) -> str:
        """Its folder below the storage root: STAGE/NAME-FINGERPRINT, or STAGE/FINGERPRINT."""
        prefix = f"{self.name}-" if self.name else ""
        return f"{self.stage}/{prefix}{self.fingerprint}"

    def claim(self, run: dict[str, Any]) -> bool:
        """Write down, once, what this data set is made from, and return whether this call did.

        Raises:
            ValueError: The folder was made from something else.
        """
        record = {"fingerprint": self.fingerprint, "schema_version": SCHEMA_VERSION} | run
        if self.store.create(f"{self.folder}/run.json", _to_json(record)):
            return True
        found = self.read_run().get("fingerprint")
        if found != self.fingerprint:
            raise ValueError(
                f"{self.store.root}/{self.folder} belongs to a run with fingerprint "
                f"{found}, not {self.fingerprint}; give another storage"
            )
        return False

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
        worker: str = "",
    ) -> Commit:
        """Store a table as a shard and commit it; the first commit of a shard wins.

        Returns:
            The commit that counts: this one, or the one that was there first.
        """
        attempt = uuid.uuid4().hex[:12]
        data = encode_table(table, self.fingerprint, shard)
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
            worker=worker,
        )
        self.store.write(f"{self.folder}/{commit.file}", data)
        if rejected:
            lines = "".join(json.dumps(reject) + "\n" for reject in rejected)
            self.store.write(f"{self.folder}/rejects/{shard:05d}.jsonl", lines.encode())
        is_first = self.store.create(self._commit_name(shard), _to_json(asdict(commit)))
        log_event(
            "committed" if is_first else "committed by another before",
            run=self.store.root,
            stage=self.stage,
            **({"source": self.name} if self.name else {}),
            shard=shard,
            tokens=tokens,
            bytes=len(data),
            rejects=len(rejected),
        )
        if is_first:
            return commit
        self.store.remove(f"{self.folder}/{commit.file}")
        return self.read_commit(shard)

    def read_shard(self, commit: Commit, columns: list[str] | None = None) -> pa.Table:
        """Return a committed shard, checked against its record's sha256.

        Raises:
            ShardError: The shard is missing, or is not the one that was committed.
        """
        name = f"{self.store.root}/{self.folder}/{commit.file}"
        try:
            data = self.store.read(f"{self.folder}/{commit.file}")
            is_sound = hashlib.sha256(data).hexdigest() == commit.sha256
            if not is_sound:  # perhaps on its way here
                data = self.store.read(f"{self.folder}/{commit.file}")
                is_sound = hashlib.sha256(data).hexdigest() == commit.sha256
        except FileNotFoundError as error:
            raise ShardError(f"{name} is gone; {REMEDY}") from error
        if not is_sound:
            fault = "sha256 differs" if len(data) == commit.num_bytes else f"{len(data)} bytes"
            raise ShardError(
                f"{name} is not what was committed: {fault}, of {commit.num_bytes}; {REMEDY}"
            )
        found = decode_origin(data)
        if found != (self.fingerprint, commit.shard):
            raise ShardError(
                f"{name} is shard {found[1]} of the data set {found[0]}, not shard {commit.shard} "
                f"of {self.fingerprint}; {REMEDY}"
            )
        # The checksums of pages, for other readers, would say nothing that sha256 has not said.
        return pq.read_table(pa.BufferReader(data), columns=columns)

    def read_commit(self, shard: int) -> Commit:
        """Return one shard's commit record.

        Raises:
            ShardError: The shard is not committed, or its record is damaged.
        """
        name = self._commit_name(shard)
        try:
            commit = Commit(**json.loads(self.store.read(name)))
        except FileNotFoundError as error:
            raise ShardError(f"{self.folder}: shard {shard} is not committed") from error
        except (ValueError, TypeError) as error:
            raise ShardError(
                f"{self.store.root}/{name} is no commit record ({error}); {REMEDY}"
            ) from error
        if commit.shard != shard:
            raise ShardError(
                f"{self.store.root}/{name} is the record of shard {commit.shard}; {REMEDY}"
            )
        return commit

    def is_committed(self, shard: int) -> bool:
        """Return whether a shard counts by now."""
        try:
            self.store.read(self._commit_name(shard))
        except FileNotFoundError:
            return False
        return True

    def list_committed(self, num_shards: int = 0) -> set[int]:
        """Return the shards that count, from names alone: no record is read.

        Args:
            num_shards: How many there may be, where that is known: many are listed in parallel.
        """
        parts = self.list_files("commits", num_shards)
        return {int(name.partition(".")[0]) for part in parts for name in part}

    def list_files(self, folder: str, num_shards: int) -> Iterator[dict[str, int]]:
        """Yield the sizes of a folder's files, in parts.

        S3 lists a thousand names at a time, one page after the other: a million shards are listed
        by the first digits of their names. Other stores would list all of them for each.
        """
        path = f"{self.folder}/{folder}"
        if num_shards < MANY_SHARDS or not self.store.lists_by_prefix:
            yield self.store.sizes(path)
            return
        with ThreadPoolExecutor(NUM_READERS) as readers:
            prefixes = [f"{number:02d}" for number in range(100)]
            yield from readers.map(lambda prefix: self.store.sizes(path, prefix), prefixes)

    def commits(self, num_shards: int = 0) -> dict[int, Commit]:
        """Return the commit records by shard: the manifest's, or the single ones without it.

        Args:
            num_shards: As for `list_committed`.

        Raises:
            ShardError: A record, or the manifest, is damaged.
        """
        manifest = self.read_manifest()
        if manifest is not None:
            return {commit.shard: commit for commit in self._read_records(manifest)}
        shards = sorted(self.list_committed(num_shards))
        with ThreadPoolExecutor(NUM_READERS) as readers:
            return dict(zip(shards, readers.map(self.read_commit, shards), strict=True))

    def count_rejects(self, committed: Collection[int], num_shards: int) -> int:
        """Return the rejects of committed shards; only the records of those with any are read."""
        parts = self.list_files("rejects", num_shards)
        listed = {int(name.partition(".")[0]) for part in parts for name in part}
        with ThreadPoolExecutor(NUM_READERS) as readers:
            found = readers.map(self.read_commit, listed.intersection(committed))
            return sum(commit.rejects for commit in found)

    def read_manifest(self) -> Manifest | None:
        """Return the manifest, or nothing while the data set is not whole.

        Raises:
            ShardError: It is damaged.
        """
        name = f"{self.folder}/manifest.json"
        try:
            record = json.loads(self.store.read(name))
            return Manifest(**{key: record[key] for key in Manifest.__dataclass_fields__})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError) as error:
            raise ShardError(f"{self.store.root}/{name} is no manifest; {REMEDY}") from error

    def _read_records(self, manifest: Manifest) -> list[Commit]:
        records = self._read_records_table(manifest).to_pylist()
        return [Commit(**record | {"stats": dict(record["stats"])}) for record in records]

    def _read_records_table(self, manifest: Manifest, columns: list[str] | None = None) -> pa.Table:
        name = f"{self.folder}/{manifest.records}"
        try:
            data = self.store.read(name)
        except FileNotFoundError as error:
            raise ShardError(f"{self.store.root}/{name} is gone; {REMEDY}") from error
        if hashlib.sha256(data).hexdigest() != manifest.records_sha256:
            raise ShardError(f"{self.store.root}/{name} is not what was written; {REMEDY}")
        return pq.read_table(pa.BufferReader(data), columns=columns)

    def drop_shards(self, shards: Iterable[int]) -> None:
        """Forget the commits of shards, so that they are made again."""
        shards = sorted(shards)
        if not shards:
            return
        self.drop_manifest()  # first of all: without it nobody takes the data set for whole
        for shard in shards:
            self.store.remove(self._commit_name(shard))

    def drop_manifest(self) -> None:
        """Forget that the data set is whole; `finish` makes the manifest again."""
        self.store.remove(f"{self.folder}/manifest.json")
        for name in self.store.sizes(self.folder):
            if name.startswith("records-"):
                self.store.remove(f"{self.folder}/{name}")

    def drop_lost_shards(self, num_shards: int = 0) -> list[int]:
        """Forget the committed shards whose file is not there, and return them.

        By listings alone, where there is no manifest: what else is wrong, readers find.

        Args:
            num_shards: As for `list_committed`.
        """
        manifest = self.read_manifest()
        if manifest is None:
            committed = self.list_committed(num_shards)  # first: data comes before its commit
            files = self.list_files("data", num_shards)
            lost = sorted(committed - {shard_of(name) for part in files for name in part})
        else:
            lost = self._find_changed(manifest)
        self.drop_shards(lost)
        return lost

    def _find_changed(self, manifest: Manifest) -> list[int]:
        """Return the shards whose file is gone or has another size than was committed."""
        records = self._read_records_table(manifest, ["file", "num_bytes"])
        unseen = dict(zip(records["file"].to_pylist(), range(manifest.num_shards), strict=True))
        num_bytes = records["num_bytes"].to_numpy()
        for part in self.list_files("data", manifest.num_shards):
            for name, size in part.items():
                shard = unseen.get(f"data/{name}")
                if shard is not None and num_bytes[shard] == size:
                    del unseen[f"data/{name}"]
        return sorted(unseen.values())

    def finish(self, num_shards: int) -> None:
        """Write the manifest of a data set that is whole.

        Raises:
            ShardError: Shards are missing.
        """
        if self.read_manifest() is not None:
            return
        commits = self.commits(num_shards)
        missing = sorted(set(range(num_shards)) - set(commits))
        if missing:
            raise ShardError(f"{self.folder}: {len(missing)} shards missing, first {missing[0]}")
        sink = pa.BufferOutputStream()
        records = [asdict(commits[shard]) for shard in range(num_shards)]
        pq.write_table(pa.Table.from_pylist(records, schema=RECORDS), sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        sha256 = hashlib.sha256(data).hexdigest()
        manifest = Manifest(
            num_shards=num_shards,
            rows=sum(commit.rows for commit in commits.values()),
            tokens=sum(commit.tokens for commit in commits.values()),
            rejects=sum(commit.rejects for commit in commits.values()),
            records=f"records-{sha256[:12]}.parquet",
            records_sha256=sha256,
        )
        self.store.write(f"{self.folder}/{manifest.records}", data)
        record = self.read_run() | asdict(manifest)
        self.store.write(f"{self.folder}/manifest.json", _to_json(record))

    def is_complete(self) -> bool:
        """Return whether every shard is committed and its file is there, as long as it was.

        Raises:
            ShardError: The manifest is damaged.
        """
        manifest = self.read_manifest()
        return manifest is not None and not self._find_changed(manifest)

    def _commit_name(self, shard: int) -> str:
        return f"{self.folder}/commits/{shard:05d}.json"


def list_missing(data: DataSet, num_shards: int) -> list[int]:
    """Return the shards of a data set that are still to be made, those that are lost among them."""
    data.drop_lost_shards(num_shards)
    done = data.list_committed(num_shards)
    return [shard for shard in range(num_shards) if shard not in done]


def split_shards(shards: Sequence[int], max_blocks: int = MAX_BLOCKS) -> list[pa.Table]:
    """Split shard numbers into tables of one column `shard`, the blocks of a Ray Data stream.

    Args:
        shards: The shard numbers.
        max_blocks: Blocks at most; fewer where there are fewer shards.
    """
    numbers = pa.table({"shard": pa.array(shards, pa.int64())})
    num_blocks = min(len(shards), max_blocks)
    cuts = [len(shards) * block // num_blocks for block in range(num_blocks + 1)]
    return [numbers.slice(a, b - a) for a, b in pairwise(cuts)]


def shard_of(name: str) -> int:
    """Return the shard of a data file's name, NUMBER-ATTEMPT.parquet."""
    return int(name.partition("-")[0])


def _to_json(record: dict[str, Any]) -> bytes:
    return json.dumps(record, indent=1, sort_keys=True).encode()
