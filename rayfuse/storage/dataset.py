"""A data set: numbered shards, each part of it once its commit record exists."""

import hashlib
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from rayfuse.config.base import UserError
from rayfuse.runtime.logging import log_event
from rayfuse.schema import SCHEMA_VERSION
from rayfuse.storage.listing import NUM_READERS, list_files, list_shards
from rayfuse.storage.manifest import (
    Commit,
    Manifest,
    build_manifest,
    check_version,
    decode_commit,
    decode_manifest,
    decode_records,
    decode_run,
    encode_records,
    hash_text,
)
from rayfuse.storage.parquet import decode_origin, encode_table, read_parquet
from rayfuse.storage.rejects import Reject, decode_rejects, encode_rejects
from rayfuse.storage.seal import REMEDY, ShardError, seal
from rayfuse.storage.store import Store


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
    inputs: tuple["DataSet", ...] = ()
    """The data sets that its shards are made from: shard N from their shards N."""

    @property
    def folder(self) -> str:
        """Its folder below the storage root: STAGE/NAME-FINGERPRINT, or STAGE/FINGERPRINT."""
        prefix = f"{self.name}-" if self.name else ""
        return f"{self.stage}/{prefix}{self.fingerprint}"

    def claim(self, run: dict[str, Any]) -> bool:
        """Write the run record if there is none; return True if this call wrote it.

        Args:
            run: What the data set is made from, beside its fingerprint.

        Raises:
            UserError: The folder was made from something else, or has another schema version.
            ShardError: The run record is corrupt.
        """
        record = {"fingerprint": self.fingerprint, "schema_version": SCHEMA_VERSION} | run
        if self.store.create(f"{self.folder}/run.json", seal(record)):
            return True
        found = self.read_run().get("fingerprint")
        if found != self.fingerprint:
            raise UserError(
                f"{self.store.root}/{self.folder} belongs to a run with fingerprint "
                f"{found}, not {self.fingerprint}; set another storage"
            )
        return False

    def read_run(self) -> dict[str, Any]:
        """Read the run record that `claim` wrote.

        Raises:
            FileNotFoundError: The data set is not claimed yet.
            ShardError: The record is corrupt.
            UserError: It has another schema version.
        """
        data = self.store.read(f"{self.folder}/run.json")
        return decode_run(data, self._path("run.json"), self.store.root)

    def write_shard(
        self,
        shard: int,
        table: pa.Table,
        *,
        tokens: int,
        rejects: Iterable[Reject] = (),
        stats: dict[str, float] | None = None,
        worker: str = "",
        inputs: Mapping[str, str] | None = None,
    ) -> Commit:
        """Write a table as a shard and commit it; the first commit of a shard is kept.

        Args:
            shard: The shard's number.
            table: Its rows.
            tokens: Number of tokens in them.
            rejects: Rows or documents that could not be used.
            stats: Sums over the shard.
            worker: The worker's name.
            inputs: What it was made from: by stage, the `identity` of the input's commit.

        Returns:
            The shard's commit: this call's, or an earlier one.
        """
        attempt = uuid.uuid4().hex[:12]
        data = encode_table(table, self.fingerprint, shard)
        rejected = list(rejects)
        rejects_data = encode_rejects(rejected)
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
            rejects_sha256=hashlib.sha256(rejects_data).hexdigest() if rejected else "",
            text_sha256=hash_text(table) if "text" in table.column_names else "",
            inputs=dict(inputs or {}),
        )
        self.store.write(f"{self.folder}/{commit.file}", data)
        if rejected:
            self.store.write(f"{self.folder}/rejects/{shard:05d}.jsonl", rejects_data)
        # The commit point: readers start from this record, so the shard is visible from here on.
        is_first = self.store.create(self._commit_name(shard), seal(asdict(commit)))
        log_event(
            "committed" if is_first else "already committed by another worker",
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
        """Read a committed shard and check it against its record's sha256.

        Raises:
            ShardError: The shard is missing, or is not the one that was committed.
            UserError: It has another schema version.
        """
        data = self.read_file(commit)
        fingerprint, shard, version = decode_origin(data)
        check_version(version, self.store.root)
        if (fingerprint, shard) != (self.fingerprint, commit.shard):
            raise ShardError(
                f"{self._path(commit.file)} is shard {shard} of the data set {fingerprint}, not "
                f"shard {commit.shard} of {self.fingerprint}; {REMEDY}"
            )
        # sha256 covers the file; the page checksums are for other readers.
        return read_parquet(data, columns)

    def read_file(self, commit: Commit) -> bytes:
        """Read a committed shard's bytes and check their sha256.

        Raises:
            ShardError: They are missing or corrupt.
        """
        return self._read_checked(commit.file, commit.sha256)

    def _read_checked(self, name: str, sha256: str) -> bytes:
        """Read a file and check its sha256.

        Raises:
            ShardError: It is missing or corrupt.
        """
        for _ in range(2):  # the network may have corrupted it: then it is read once more
            try:
                data = self.store.read(f"{self.folder}/{name}")
            except FileNotFoundError as error:
                raise ShardError(f"{self._path(name)} is missing; {REMEDY}") from error
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
        raise ShardError(
            f"{self._path(name)} is not what was committed: its sha256 differs; {REMEDY}"
        )

    def read_rejects(self, commit: Commit) -> list[Reject]:
        """Read the rejects of a shard.

        Raises:
            ShardError: They are missing or corrupt.
        """
        if not commit.rejects_sha256:
            return []
        name = f"rejects/{commit.shard:05d}.jsonl"
        data = self._read_checked(name, commit.rejects_sha256)
        return decode_rejects(data)

    def read_commit(self, shard: int) -> Commit:
        """Read one shard's commit record.

        Raises:
            ShardError: The shard is not committed, or its record is corrupt.
        """
        name = self._commit_name(shard)
        try:
            data = self.store.read(name)
        except FileNotFoundError as error:
            raise ShardError(f"{self.folder}: shard {shard} is not committed") from error
        return decode_commit(data, f"{self.store.root}/{name}", shard)

    def is_committed(self, shard: int) -> bool:
        """Check whether a shard has a commit record."""
        try:
            self.store.read(self._commit_name(shard))
        except FileNotFoundError:
            return False
        return True

    def list_committed(self, num_shards: int = 0) -> set[int]:
        """List the committed shards, from the names of their records alone.

        Args:
            num_shards: How many there may be, where it is known: many are listed in parallel.
        """
        return list_shards(self.store, self.folder, "commits", num_shards)

    def commits(self, num_shards: int = 0) -> dict[int, Commit]:
        """Read the commit records by shard: the manifest's, or without one the single ones.

        Args:
            num_shards: As for `list_committed`.

        Raises:
            ShardError: A record or the manifest is corrupt.
            UserError: The manifest has another schema version.
        """
        manifest = self.read_manifest()
        if manifest is not None:
            records = self._read_records(manifest)
            return dict(enumerate(decode_records(records, self._path(manifest.records))))
        shards = sorted(self.list_committed(num_shards))
        with ThreadPoolExecutor(NUM_READERS) as readers:
            return dict(zip(shards, readers.map(self.read_commit, shards), strict=True))

    def count_rejects(self, committed: Collection[int], num_shards: int) -> int:
        """Sum the rejects of committed shards, reading only the records of shards that have any."""
        listed = list_shards(self.store, self.folder, "rejects", num_shards)
        with ThreadPoolExecutor(NUM_READERS) as readers:
            found = readers.map(self.read_commit, listed.intersection(committed))
            return sum(commit.rejects for commit in found)

    def read_manifest(self) -> Manifest | None:
        """Read the manifest; None while the data set is not complete.

        Raises:
            ShardError: It is corrupt.
            UserError: It has another schema version.
        """
        try:
            data = self.store.read(f"{self.folder}/manifest.json")
        except FileNotFoundError:
            return None
        return decode_manifest(data, self._path("manifest.json"), self.store.root)

    def _read_records(self, manifest: Manifest, columns: list[str] | None = None) -> pa.Table:
        data = self._read_checked(manifest.records, manifest.records_sha256)
        return read_parquet(data, columns)

    def drop_shards(self, shards: Iterable[int]) -> None:
        """Remove the commit records of shards, so that a stage writes the shards again."""
        shards = sorted(shards)
        if not shards:
            return
        self.drop_manifest()  # first, so that no reader takes the data set for complete
        for shard in shards:
            self.store.remove(self._commit_name(shard))

    def drop_manifest(self) -> None:
        """Remove the manifest, which makes the data set incomplete until `finish` writes it."""
        self.store.remove(f"{self.folder}/manifest.json")
        for name in self.store.sizes(self.folder):
            if name.startswith("records-"):
                self.store.remove(f"{self.folder}/{name}")

    def drop_missing_shards(self, num_shards: int = 0) -> list[int]:
        """Remove the commit records of shards without their file, and return these shards.

        It uses listings alone. With a manifest it also compares sizes, and the inputs of each
        shard: stale shards are removed, too. Readers detect files that are corrupt in another way.

        Args:
            num_shards: As for `list_committed`.
        """
        manifest = self.read_manifest()
        if manifest is None:
            committed = self.list_committed(num_shards)  # first: data is written before its record
            files = list_shards(self.store, self.folder, "data", num_shards)
            missing = sorted(committed - files)
        else:
            missing = self._find_changed(manifest)
        self.drop_shards(missing)
        return missing

    def _find_changed(self, manifest: Manifest) -> list[int]:
        """List the shards that are stale, or whose file is missing or has another size."""
        records = self._read_records(manifest, ["file", "num_bytes", "inputs"])
        unseen = dict(zip(records["file"].to_pylist(), range(manifest.num_shards), strict=True))
        num_bytes = records["num_bytes"].to_numpy()
        for part in list_files(self.store, self.folder, "data", manifest.num_shards):
            for name, size in part.items():
                shard = unseen.get(f"data/{name}")
                if shard is not None and num_bytes[shard] == size:
                    del unseen[f"data/{name}"]
        inputs = {s: dict(of_shard) for s, of_shard in enumerate(records["inputs"].to_pylist())}
        return sorted({*unseen.values(), *self.find_stale(inputs)})

    def find_stale(self, made_from: Mapping[int, Mapping[str, str]]) -> list[int]:
        """List the shards that were made from other inputs than there are now.

        Inputs that are incomplete, or that a shard has not recorded, are not compared.

        Args:
            made_from: The `inputs` of each shard's commit.
        """
        stale: set[int] = set()
        for data in self.inputs:
            now = data.read_identities()
            for shard, inputs in made_from.items():
                recorded = inputs.get(data.stage)
                if recorded is not None and now and recorded != now.get(shard):
                    stale.add(shard)
        return sorted(stale)

    def read_identities(self) -> dict[int, str]:
        """Read the identity of each shard of a complete data set; empty for an incomplete one."""
        manifest = self.read_manifest()
        if manifest is None:
            return {}
        records = self._read_records(manifest, ["sha256", "text_sha256"])
        texts, files = records["text_sha256"].to_pylist(), records["sha256"].to_pylist()
        return {s: text or file for s, (text, file) in enumerate(zip(texts, files, strict=True))}

    def finish(self, num_shards: int) -> None:
        """Write the manifest of a complete data set, unless it exists.

        Raises:
            ShardError: Shards are missing, or were made from other inputs than there are now.
        """
        if self.read_manifest() is not None:
            return
        commits = self.commits(num_shards)
        missing = sorted(set(range(num_shards)) - set(commits))
        if missing:
            raise ShardError(f"{self.folder}: {len(missing)} shards missing, first {missing[0]}")
        stale = self.find_stale({shard: commit.inputs for shard, commit in commits.items()})
        if stale:
            self.drop_shards(stale)
            raise ShardError(
                f"{self.folder}: {len(stale)} shards, the first is {stale[0]}, were made from "
                "other rows than there are now; run the same command again, which makes them again"
            )
        self.write_manifest([commits[shard] for shard in range(num_shards)], self.read_run())

    def write_manifest(self, commits: Sequence[Commit], run: dict[str, Any]) -> Manifest:
        """Write the records of all shards, and then the manifest, which is returned.

        Args:
            commits: The commit records, sorted by shard.
            run: The run record, which the manifest repeats.
        """
        records = encode_records(commits)
        manifest = build_manifest(commits, hashlib.sha256(records).hexdigest())
        self.store.write(f"{self.folder}/{manifest.records}", records)
        self.store.write(f"{self.folder}/manifest.json", seal(run | asdict(manifest)))
        return manifest

    def is_complete(self) -> bool:
        """Check that every shard is committed, not stale, and its file has its committed size.

        Raises:
            ShardError: The manifest is corrupt.
            UserError: It has another schema version.
        """
        manifest = self.read_manifest()
        return manifest is not None and not self._find_changed(manifest)

    def _commit_name(self, shard: int) -> str:
        return f"{self.folder}/commits/{shard:05d}.json"

    def _path(self, name: str) -> str:
        return f"{self.store.root}/{self.folder}/{name}"
