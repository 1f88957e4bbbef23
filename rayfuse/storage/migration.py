"""What a migration to another schema version does with data sets, whatever the version."""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rayfuse.runtime.progress import Progress, ProgressEvent
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.lease import Lease
from rayfuse.storage.manifest import Commit, check_commit, decode_commit, hash_text, parse_shard
from rayfuse.storage.parquet import decode_origin, encode_table, read_parquet
from rayfuse.storage.seal import ShardError, is_sealed, seal
from rayfuse.storage.store import Store

STAGES = ("captured", "aligned", "evaluate", "corpus")
"""Folders of data sets. A corpus comes last: if all corpora are migrated, everything is."""

NUM_READERS = 8
"""Shards that are migrated concurrently: a gigabyte at most."""

Json = dict[str, Any]


@dataclass
class Migration:
    """A migration in progress, and what it has written so far."""

    store: Store
    lease: Lease
    progress: Progress
    data_sets: int = 0
    """Data sets that were migrated."""
    shards: int = 0
    """Shards that were written again."""
    files: int = 0
    """Other files that were written or renamed."""
    corrupt: list[str] = field(default_factory=list[str])
    """Shards and records that could not be read. They stay as they are; `rayfuse verify --repair`
    has them written again."""

    def write(self, name: str, data: bytes) -> None:
        """Write a file that belongs to no data set."""
        self.store.write(name, data)
        self.files += 1


def list_runs(store: Store) -> Iterator[tuple[DataSet, Json]]:
    """Yield the data sets of a store and their run records, of any schema version.

    Raises:
        ShardError: A run record is corrupt.
    """
    for stage in STAGES:
        for folder in store.folders(stage):
            name = f"{stage}/{folder}/run.json"
            try:
                run = json.loads(store.read(name))
                fingerprint, _ = str(run["fingerprint"]), int(run["schema_version"])
            except FileNotFoundError:  # the model of a merge, or a claim that was lost
                continue
            except (ValueError, KeyError, TypeError) as error:
                raise ShardError(
                    f"{store.root}/{name} is no run record ({error!r}); remove the folder "
                    f"{stage}/{folder}; its stage then writes it again"
                ) from error
            own_name = folder.removesuffix(fingerprint).removesuffix("-")
            yield DataSet(store, stage, own_name, fingerprint), run


def migrate_data_sets(
    migration: Migration, version: int, convert_recipe: Callable[[Json], Json]
) -> None:
    """Migrate the data sets of one schema version to the next one.

    Args:
        migration: The migration.
        version: The version to migrate from.
        convert_recipe: Converts a resolved recipe to the next version.
    """
    for data, run in list_runs(migration.store):
        if run["schema_version"] != version:
            continue
        _migrate_data_set(migration, data, version, convert_record(run, version, convert_recipe))
        migration.data_sets += 1


def convert_record(record: Json, version: int, convert_recipe: Callable[[Json], Json]) -> Json:
    """Convert a run record to the next schema version."""
    converted = record | {"schema_version": version + 1}
    if "recipe" in record:
        converted["recipe"] = convert_recipe(record["recipe"])
    return converted


def _migrate_data_set(migration: Migration, data: DataSet, version: int, run: Json) -> None:
    store, folder = data.store, data.folder
    has_manifest = "manifest.json" in store.sizes(folder)
    shards = sorted(data.list_committed())
    commits: dict[int, Commit] = {}
    with ThreadPoolExecutor(NUM_READERS) as readers:
        found = readers.map(lambda shard: _migrate_shard(migration, data, shard, version), shards)
        for done, (shard, commit) in enumerate(zip(shards, found, strict=True), 1):
            commits |= {} if commit is None else {shard: commit}
            migration.lease.renew()
            migration.progress(ProgressEvent("migrate", folder, done, len(shards), "shards"))
    _remove_orphans(data, commits)
    if has_manifest:
        _migrate_manifest(data, commits, run)
    store.write(f"{folder}/run.json", seal(run))


def _migrate_shard(migration: Migration, data: DataSet, shard: int, version: int) -> Commit | None:
    """Write a shard in the next schema version and replace its commit record.

    Returns:
        The new commit record; the old one if the file is migrated already or corrupt. None for a
        corrupt record.
    """
    try:
        commit = _read_commit(data, shard)
    except ShardError as error:
        migration.corrupt.append(str(error))
        return None
    try:
        content = data.read_file(commit)
    except ShardError as error:
        migration.corrupt.append(str(error))
        return commit
    fingerprint, number, found = decode_origin(content)
    if found != version:
        return commit
    table = read_parquet(content).combine_chunks()
    migrated = encode_table(table, fingerprint, number, version=version + 1)
    sha256 = hashlib.sha256(migrated).hexdigest()
    attempt = sha256[:12]  # the same after a kill, so that no orphan is left
    new = replace(
        commit,
        file=f"data/{shard:05d}-{attempt}.parquet",
        num_bytes=len(migrated),
        sha256=sha256,
        attempt=attempt,
        rejects_sha256=_hash_rejects(data, commit),
        text_sha256=hash_text(table) if "text" in table.column_names else "",
    )
    data.store.write(f"{data.folder}/{new.file}", migrated)
    data.store.write(f"{data.folder}/commits/{shard:05d}.json", seal(asdict(new)))
    data.store.remove(f"{data.folder}/{commit.file}")
    migration.shards += 1
    return new


def _read_commit(data: DataSet, shard: int) -> Commit:
    """Read a commit record of this schema version, or of version 4, which has no checksum.

    Raises:
        ShardError: It is corrupt.
    """
    name = f"{data.folder}/commits/{shard:05d}.json"
    content, path = data.store.read(name), f"{data.store.root}/{name}"
    if is_sealed(content):
        return decode_commit(content, path, shard)
    try:
        return check_commit(Commit(**json.loads(content)), shard, path)
    except (ValueError, TypeError) as error:
        raise ShardError(f"{path} is no commit record ({error})") from error


def _hash_rejects(data: DataSet, commit: Commit) -> str:
    """Hash the file of a shard's rejects; a lost one gets a hash that nothing has."""
    if not commit.rejects:
        return ""
    try:
        return data.store.hash_file(f"{data.folder}/rejects/{commit.shard:05d}.jsonl")
    except FileNotFoundError:
        return "missing"


def _remove_orphans(data: DataSet, commits: dict[int, Commit]) -> None:
    """Remove files of committed shards that are not the committed ones.

    A migration that was killed after it replaced a commit record has left the shard's old file.
    """
    for name in data.store.sizes(f"{data.folder}/data"):
        shard = parse_shard("data", name)
        commit = None if shard is None else commits.get(shard)
        if commit is not None and commit.file != f"data/{name}":
            data.store.remove(f"{data.folder}/data/{name}")


def _migrate_manifest(data: DataSet, commits: dict[int, Commit], run: Json) -> None:
    """Write the manifest again, or remove it if it lists a shard without an intact record."""
    store, name = data.store, f"{data.folder}/manifest.json"
    try:
        num_shards = int(json.loads(store.read(name))["num_shards"])
    except (ValueError, KeyError, TypeError):
        return  # corrupt: `rayfuse verify --repair` removes it
    if set(commits) != set(range(num_shards)):
        data.drop_manifest()
        return
    manifest = data.write_manifest([commits[shard] for shard in range(num_shards)], run)
    for file in store.sizes(data.folder, "records-"):
        if file != manifest.records:
            store.remove(f"{data.folder}/{file}")
