"""Every shard of a data set read and checked; what is damaged is named, and forgotten on demand."""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from rayfuse.storage.dataset import Commit, DataSet, ShardError, shard_of

NUM_READERS = 8
"""Shards read at a time: a gigabyte at most."""

NUM_RECORD_READERS = 32
"""Commit records read at a time."""


@dataclass(frozen=True)
class Damage:
    """Something of a data set that is not what it should be."""

    file: str
    """Below the storage root."""
    reason: str
    shard: int | None = None
    """The shard to make again; without one, it is the manifest or the run record."""


@dataclass(frozen=True)
class Verified:
    """What reading a data set whole has shown."""

    folder: str
    shards_checked: int
    damages: list[Damage]
    orphans: list[str]
    """Files below the root that count for nothing: left by attempts that lost or were killed."""


def verify_data_set(
    data: DataSet, corpus: DataSet | None = None, tell: Callable[[int, int], None] | None = None
) -> Verified:
    """Read every shard of a data set and check it against its record, and its rows against the
    corpus.

    Args:
        data: The data set; it need not be whole.
        corpus: The data set whose rows it must hold, in the same order.
        tell: Called with the shards checked so far and their number.
    """
    num_shards = _count_shards(data) or (_count_shards(corpus) if corpus else 0)
    shards = sorted(data.list_committed(num_shards))
    with ThreadPoolExecutor(NUM_RECORD_READERS) as readers:
        found = readers.map(lambda shard: _read_record(data, shard), shards)
        records = dict(zip(shards, found, strict=True))
    commits = {s: record for s, record in records.items() if isinstance(record, Commit)}
    damages = [record for record in records.values() if isinstance(record, Damage)]
    damages += _check_records(data, records.keys(), commits)
    bad_records = {damage.shard for damage in damages}
    good = [commit for shard, commit in commits.items() if shard not in bad_records]
    checked = 0
    with ThreadPoolExecutor(NUM_READERS) as readers:
        for damage in readers.map(lambda commit: _check_shard(data, commit, corpus), good):
            checked += 1
            damages += [damage] if damage else []
            if tell:
                tell(checked, len(good))
    orphans = _find_orphans(data, {commit.shard: commit for commit in good}, num_shards)
    return Verified(data.folder, len(shards), damages, orphans)


def _count_shards(data: DataSet) -> int:
    """Return how many shards a data set has; 0 where its manifest does not say."""
    try:
        manifest = data.read_manifest()
    except ShardError:
        return 0
    return manifest.num_shards if manifest else 0


def _read_record(data: DataSet, shard: int) -> Commit | Damage:
    try:
        return data.read_commit(shard)
    except ShardError as error:
        return Damage(f"{data.folder}/commits/{shard:05d}.json", str(error), shard)


def _check_records(
    data: DataSet, shards: Collection[int], commits: dict[int, Commit]
) -> Iterator[Damage]:
    """Yield what is wrong with the run record, with the manifest, and between it and the records.

    Args:
        data: The data set.
        shards: Those that have a commit record.
        commits: The records that can be read.
    """
    try:
        if shards and data.read_run().get("fingerprint") != data.fingerprint:
            yield Damage(f"{data.folder}/run.json", "belongs to another run")
    except (ValueError, FileNotFoundError) as error:
        yield Damage(f"{data.folder}/run.json", f"is no run record: {error}")
    try:
        listed = data.commits() if data.read_manifest() else commits
    except ShardError as error:
        yield Damage(f"{data.folder}/manifest.json", str(error))
        return
    for shard in sorted(listed.keys() | commits.keys()):
        if shard in listed and shard not in shards:
            yield Damage(f"{data.folder}/commits/{shard:05d}.json", "is gone", shard)
        elif shard in commits and listed.get(shard) != commits[shard]:
            yield Damage(
                f"{data.folder}/commits/{shard:05d}.json", "differs from the manifest", shard
            )


def _check_shard(data: DataSet, commit: Commit, corpus: DataSet | None) -> Damage | None:
    shard = commit.shard
    name = f"{data.folder}/{commit.file}"
    try:
        table = data.read_shard(commit)
    except (ShardError, pa.ArrowException, OSError) as error:
        return Damage(name, str(error), shard)
    if table.num_rows != commit.rows:
        return Damage(name, f"has {table.num_rows} rows, not {commit.rows}", shard)
    if corpus is None:
        return None
    try:
        rows = corpus.read_shard(corpus.read_commit(shard), columns=["row_id"])
    except (ShardError, pa.ArrowException, OSError):
        return None  # the corpus shard is damaged, and named where the corpus is verified
    if not rows["row_id"].equals(table["row_id"]):
        return Damage(name, "holds other rows than the corpus", shard)
    return None


def _find_orphans(data: DataSet, commits: dict[int, Commit], num_shards: int) -> list[str]:
    """Return the data files of committed shards that are not the committed ones.

    Such a file can never count any more: its shard has its commit. Files of shards without one are
    left alone, since a worker may be about to commit them.
    """
    return sorted(
        f"{data.folder}/data/{name}"
        for part in data.list_files("data", num_shards)
        for name in part
        if (commit := commits.get(shard_of(name))) and commit.file != f"data/{name}"
    )


def forget_damages(data: DataSet, verified: Verified, run: dict[str, Any]) -> None:
    """Take away what is damaged and what counts for nothing: its stage then makes it again.

    Args:
        data: The data set.
        verified: What is wrong with it.
        run: What it is made from, for a run record that is damaged.
    """
    for name in verified.orphans:
        data.store.remove(name)
    if not verified.damages:
        return
    data.drop_manifest()
    for damage in verified.damages:
        if damage.file.endswith("/run.json"):
            data.store.remove(damage.file)
            data.claim(run)
        elif damage.shard is not None and not damage.file.endswith(".json"):
            data.store.remove(damage.file)
    data.drop_shards(damage.shard for damage in verified.damages if damage.shard is not None)


@dataclass(frozen=True)
class Status:
    """How far a data set is, from its records alone."""

    folder: str
    is_complete: bool
    shards: int
    num_shards: int | None
    """None while nobody knows."""
    rows: int
    tokens: int
    rejects: dict[str, int]
    """By reason."""
    last_metrics: dict[str, Any] | None
    """The last line of metrics.jsonl."""


def read_status(data: DataSet, num_shards: int | None) -> Status:
    """Return how far a data set is.

    Args:
        data: The data set.
        num_shards: What its corpus has, where that is known.

    Raises:
        ShardError: A record is damaged.
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
    counts: Counter[str] = Counter()
    for commit in commits:
        if commit.rejects:
            lines = data.store.read(f"{data.folder}/rejects/{commit.shard:05d}.jsonl").splitlines()
            counts.update(json.loads(line)["reason"] for line in lines)
    return dict(counts.most_common())


def _read_last_metrics(data: DataSet) -> dict[str, Any] | None:
    try:
        lines = data.store.read(f"{data.folder}/metrics.jsonl").splitlines()
    except FileNotFoundError:
        return None
    return json.loads(lines[-1]) if lines else None


def to_json(found: Verified | Status) -> dict[str, Any]:
    """Return plain values."""
    return asdict(found)
