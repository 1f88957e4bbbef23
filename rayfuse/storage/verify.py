"""Verify every shard of a data set, repair it by removing corrupt files, and read its status."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from rayfuse.config.base import UserError
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.listing import list_files
from rayfuse.storage.manifest import Commit, build_manifest, parse_shard
from rayfuse.storage.seal import ShardError, unseal

NUM_READERS = 8
"""Shards that are read concurrently: a gigabyte at most."""

METRICS_FILE = "metrics.jsonl"
"""The log of a capture's speed, beside its shards: it is shown, and decides nothing."""

NUM_RECORD_READERS = 32
"""Commit records that are read concurrently."""


@dataclass(frozen=True)
class CorruptFile:
    """A file of a data set that is missing or corrupt."""

    file: str
    """Below the storage root."""
    reason: str
    shard: int | None = None
    """The shard to write again; None for the manifest and the run record."""


@dataclass(frozen=True)
class Verified:
    """The result of verifying a data set."""

    folder: str
    shards_checked: int
    corrupt: list[CorruptFile]
    orphans: list[str]
    """Data files, below the root, of attempts that were killed or that lost the commit."""


def verify_data_set(data: DataSet, report: Callable[[int, int], None] | None = None) -> Verified:
    """Read every shard and check it against its commit record and the shards it was made from.

    Args:
        data: The data set; it may be incomplete. The first of its inputs must have the same rows.
        report: Called with the number of shards checked so far and of all shards.

    Raises:
        UserError: It has another schema version.
    """
    num_shards = _count_shards(data) or (_count_shards(data.inputs[0]) if data.inputs else 0)
    shards = sorted(data.list_committed(num_shards))
    with ThreadPoolExecutor(NUM_RECORD_READERS) as readers:
        found = readers.map(lambda shard: _read_record(data, shard), shards)
        records = dict(zip(shards, found, strict=True))
    commits = {s: record for s, record in records.items() if isinstance(record, Commit)}
    corrupt = [record for record in records.values() if isinstance(record, CorruptFile)]
    corrupt += _check_records(data, records.keys(), commits)
    corrupt += [*_find_stale(data, commits), *_check_metrics(data)]
    bad_shards = {fault.shard for fault in corrupt}
    good = [commit for shard, commit in commits.items() if shard not in bad_shards]
    checked = 0
    with ThreadPoolExecutor(NUM_READERS) as readers:
        for fault in readers.map(lambda commit: _check_shard(data, commit), good):
            checked += 1
            corrupt += [fault] if fault else []
            if report:
                report(checked, len(good))
    orphans = _find_orphans(data, {commit.shard: commit for commit in good}, num_shards)
    return Verified(data.folder, len(shards), corrupt, orphans)


def _count_shards(data: DataSet) -> int:
    """Read the number of shards from the manifest; 0 without a readable one."""
    try:
        manifest = data.read_manifest()
    except ShardError:
        return 0
    return manifest.num_shards if manifest else 0


def _read_record(data: DataSet, shard: int) -> Commit | CorruptFile:
    try:
        return data.read_commit(shard)
    except ShardError as error:
        return CorruptFile(f"{data.folder}/commits/{shard:05d}.json", str(error), shard)


def _check_records(
    data: DataSet, shards: Collection[int], commits: dict[int, Commit]
) -> Iterator[CorruptFile]:
    """Yield faults of the run record, of the manifest, and between the manifest and the records.

    Args:
        data: The data set.
        shards: The shards that have a commit record.
        commits: The records that are not corrupt.
    """
    try:
        if shards and data.read_run().get("fingerprint") != data.fingerprint:
            yield CorruptFile(f"{data.folder}/run.json", "belongs to another run")
    except FileNotFoundError:
        yield CorruptFile(f"{data.folder}/run.json", "is missing")
    except ShardError as error:
        yield CorruptFile(f"{data.folder}/run.json", str(error))
    try:
        manifest = data.read_manifest()
        listed = data.commits() if manifest else commits
    except ShardError as error:
        yield CorruptFile(f"{data.folder}/manifest.json", str(error))
        return
    if manifest and manifest != build_manifest(list(listed.values()), manifest.records_sha256):
        yield CorruptFile(f"{data.folder}/manifest.json", "differs from the records beside it")
    for shard in sorted(listed.keys() | commits.keys()):
        if shard in listed and shard not in shards:
            yield CorruptFile(f"{data.folder}/commits/{shard:05d}.json", "is missing", shard)
        elif shard in commits and listed.get(shard) != commits[shard]:
            yield CorruptFile(
                f"{data.folder}/commits/{shard:05d}.json", "differs from the manifest", shard
            )


def _find_stale(data: DataSet, commits: dict[int, Commit]) -> Iterator[CorruptFile]:
    """Yield the shards that were made from other inputs than there are now."""
    try:
        stale = data.find_stale({shard: commit.inputs for shard, commit in commits.items()})
    except ShardError:
        return  # verifying the input reports it
    for shard in stale:
        reason = "is stale: it was made from other rows than there are now"
        yield CorruptFile(f"{data.folder}/{commits[shard].file}", reason, shard)


def _check_shard(data: DataSet, commit: Commit) -> CorruptFile | None:
    shard = commit.shard
    name = f"{data.folder}/{commit.file}"
    try:
        table = data.read_shard(commit)
    # UserError: another schema version, which a migration that was interrupted may have left.
    except (ShardError, UserError, pa.ArrowException, OSError) as error:
        return CorruptFile(name, str(error), shard)
    if table.num_rows != commit.rows:
        return CorruptFile(name, f"has {table.num_rows} rows, not {commit.rows}", shard)
    try:
        data.read_rejects(commit)
    except ShardError as error:
        return CorruptFile(f"{data.folder}/rejects/{shard:05d}.jsonl", str(error), shard)
    if not data.inputs:
        return None
    corpus = data.inputs[0]
    try:
        rows = corpus.read_shard(corpus.read_commit(shard), columns=["row_id"])
    except (ShardError, UserError, pa.ArrowException, OSError):
        return None  # verifying the corpus reports its corrupt shard
    if not rows["row_id"].equals(table["row_id"]):
        return CorruptFile(name, "holds other rows than the corpus", shard)
    return None


def _find_orphans(data: DataSet, commits: dict[int, Commit], num_shards: int) -> list[str]:
    """List the data files of committed shards that are not the committed ones.

    Such a file can never be committed, since its shard is. A file of a shard without a commit is
    omitted: a worker may be about to commit it.
    """
    return sorted(
        f"{data.folder}/data/{name}"
        for part in list_files(data.store, data.folder, "data", num_shards)
        for name in part
        if (shard := parse_shard("data", name)) in commits and commits[shard].file != f"data/{name}"
    )


def repair_data_set(data: DataSet, verified: Verified, run: dict[str, Any]) -> None:
    """Remove orphans, corrupt files and the commits of their shards; the stage writes these again.

    Args:
        data: The data set.
        verified: What `verify_data_set` found.
        run: What the data set is made from, in case the run record must be written again.
    """
    for name in verified.orphans:
        data.store.remove(name)
    if any(not fault.file.endswith(f"/{METRICS_FILE}") for fault in verified.corrupt):
        data.drop_manifest()
    for fault in verified.corrupt:
        if fault.file.endswith("/run.json"):
            data.store.remove(fault.file)
            data.claim(run)
        elif fault.file.endswith((".parquet", ".jsonl")):
            data.store.remove(fault.file)
    data.drop_shards(fault.shard for fault in verified.corrupt if fault.shard is not None)


@dataclass(frozen=True)
class Status:
    """The progress of a data set, from its records alone."""

    folder: str
    is_complete: bool
    shards: int
    num_shards: int | None
    """None while the corpus is incomplete."""
    rows: int
    tokens: int
    rejects: dict[str, int]
    """By reason."""
    last_metrics: dict[str, Any] | None
    """The last line of metrics.jsonl."""


def read_status(data: DataSet, num_shards: int | None) -> Status:
    """Read the progress of a data set from its records.

    Args:
        data: The data set.
        num_shards: The number of its corpus' shards, where it is known.

    Raises:
        ShardError: A record is corrupt.
        UserError: It has another schema version.
    """
    manifest = data.read_manifest()
    commits = data.commits(num_shards or 0).values()
    return Status(
        folder=data.folder,
        is_complete=data.is_complete(),
        shards=len(commits),
        num_shards=manifest.num_shards if manifest else num_shards,
        rows=sum(commit.rows for commit in commits),
        tokens=sum(commit.tokens for commit in commits),
        rejects=_count_reasons(data, commits),
        last_metrics=_read_last_metrics(data),
    )


def _count_reasons(data: DataSet, commits: Iterable[Commit]) -> dict[str, int]:
    rejects = (reject for commit in commits for reject in data.read_rejects(commit))
    return dict(Counter(reject.reason for reject in rejects).most_common())


def _read_last_metrics(data: DataSet) -> dict[str, Any] | None:
    try:
        lines = data.store.read(f"{data.folder}/{METRICS_FILE}").splitlines()
    except FileNotFoundError:
        return None
    path = f"{data.store.root}/{data.folder}/{METRICS_FILE}"
    return unseal(lines[-1], path, indent=None) if lines else None


def _check_metrics(data: DataSet) -> Iterator[CorruptFile]:
    """Yield the log of a capture if a line of it is corrupt; a repair removes it."""
    name = f"{data.folder}/{METRICS_FILE}"
    try:
        for line in data.store.read(name).splitlines():
            unseal(line, name, indent=None)
    except FileNotFoundError:
        return
    except ShardError as error:
        yield CorruptFile(name, str(error))


def to_json(found: Verified | Status) -> dict[str, Any]:
    """Convert a result to plain values."""
    return asdict(found)
