"""Migrate a store to the current schema version: one step in `STEPS` for each earlier version.

A step first writes the files that belong to no data set, and then each data set: its shards, its
manifest, and last its run record, which holds the version. All names and bytes that a step writes
depend on the store's content alone. A migration that was killed is therefore resumed by running it
again, with the same result.
"""

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from rayfuse.config.base import UserError
from rayfuse.runtime.progress import Progress, ProgressEvent
from rayfuse.schema import SCHEMA_VERSION
from rayfuse.storage.dataset import DataSet, shard_of
from rayfuse.storage.lease import RENEW_SECONDS, TIMEOUT_SECONDS, Lease
from rayfuse.storage.manifest import Commit, ShardError, check_version, encode_json
from rayfuse.storage.parquet import decode_origin, encode_table, read_parquet
from rayfuse.storage.store import Store

STAGES = ("captured", "aligned", "evaluate", "corpus")
"""Folders of data sets. A corpus comes last: if all corpora are migrated, everything is."""

LEASE_FILE = "migrate.json"

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


def migrate_store(store: Store, progress: Progress) -> Migration:
    """Migrate everything in a store to the current schema version.

    Args:
        store: The store. No other job may write it meanwhile.
        progress: Called after each shard.

    Raises:
        UserError: The store has no data set, a version that cannot be migrated, or another process
            migrates it.
        ShardError: A run record is corrupt.
    """
    _find_oldest_version(store)  # first, so that a wrong URI is refused before a lease is written
    migration = Migration(store, Lease(store, LEASE_FILE, uuid.uuid4().hex), progress)
    _acquire(migration.lease)
    try:
        for version in range(_find_oldest_version(store), SCHEMA_VERSION):
            STEPS[version](migration)
    finally:
        migration.lease.release()
    return migration


def _acquire(lease: Lease) -> None:
    """Acquire the lease; a process that died on another node loses it after the timeout."""
    until = time.monotonic() + TIMEOUT_SECONDS + RENEW_SECONDS
    while not lease.acquire():
        if time.monotonic() > until:
            raise UserError(f"{lease.holder} migrates {lease.store.root} already; wait for its end")
        time.sleep(1.0)


def _find_oldest_version(store: Store) -> int:
    """Find the lowest schema version of a store's data sets.

    Raises:
        UserError: There is no data set, or a version that cannot be migrated.
        ShardError: A run record is corrupt.
    """
    versions = {run["schema_version"] for _, run in list_runs(store)}
    if not versions:
        raise UserError(f"storage {store.root} has no data set of rayfuse; check the folder or URI")
    if max(versions) > SCHEMA_VERSION:
        check_version(max(versions), store.root)
    oldest = min(versions)
    if oldest < min(STEPS):
        raise UserError(
            f"storage {store.root} has schema version {oldest}; versions before {min(STEPS)} "
            "cannot be migrated: run the recipe in a new storage"
        )
    return oldest


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
    store.write(f"{folder}/run.json", encode_json(run))


def _migrate_shard(migration: Migration, data: DataSet, shard: int, version: int) -> Commit | None:
    """Write a shard in the next schema version and replace its commit record.

    Returns:
        The new commit record; the old one if the file is migrated already or corrupt. None for a
        corrupt record.
    """
    try:
        commit = data.read_commit(shard)
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
    )
    data.store.write(f"{data.folder}/{new.file}", migrated)
    data.replace_commit(new)
    data.store.remove(f"{data.folder}/{commit.file}")
    migration.shards += 1
    return new


def _remove_orphans(data: DataSet, commits: dict[int, Commit]) -> None:
    """Remove files of committed shards that are not the committed ones.

    A migration that was killed after it replaced a commit record has left the shard's old file.
    """
    for name in data.store.sizes(f"{data.folder}/data"):
        commit = commits.get(shard_of(name))
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


# Version 5 renames keys, values and files; columns and fingerprints are those of version 4.

RECIPE_KEYS_5 = {"storage_patience_seconds": "storage_retry_seconds"}

CORPUS_KEYS_5 = {"recut": "resplit"}

ALIGN_METHODS_5 = {"mined": "min_edit_distance", "statistics": "cooccurrence"}

METRIC_NAMES_5 = {b'"utilisation":': b'"mfu":', b'"storage_repeats":': b'"storage_retries":'}


def migrate_4_to_5(migration: Migration) -> None:
    """Rename keys of the recipe and of metrics, and the records of segmentations and leases."""
    store = migration.store
    for prefix in ("", "held-out-"):
        for file in store.sizes("corpus", f"{prefix}kept-"):
            new = f"{prefix}segmentation-{file.removeprefix(f'{prefix}kept-')}"
            _rename(migration, f"corpus/{file}", f"corpus/{new}")
    for folder in store.folders("captured"):
        if "metrics.jsonl" in store.sizes(f"captured/{folder}"):
            _rename_metrics(migration, f"captured/{folder}/metrics.jsonl")
    for folder in store.folders("train"):
        _migrate_training_4_to_5(migration, f"train/{folder}")
    migrate_data_sets(migration, 4, convert_recipe_4_to_5)


def convert_recipe_4_to_5(recipe: Json) -> Json:
    """Convert a resolved recipe of schema version 4 to version 5; one of version 5 stays."""
    converted = {RECIPE_KEYS_5.get(key, key): value for key, value in recipe.items()}
    if "align" in converted:
        method = converted["align"].get("method")
        converted["align"] = converted["align"] | {"method": ALIGN_METHODS_5.get(method, method)}
    if "corpus" in converted:
        converted["corpus"] = {
            CORPUS_KEYS_5.get(key, key): value for key, value in converted["corpus"].items()
        }
    return converted


def _rename(migration: Migration, old: str, new: str) -> None:
    migration.write(new, migration.store.read(old))
    migration.store.remove(old)


def _migrate_done_4_to_5(migration: Migration, name: str) -> None:
    try:
        record = json.loads(migration.store.read(name))
        converted = record | {"recipe": convert_recipe_4_to_5(record["recipe"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        migration.corrupt.append(f"{migration.store.root}/{name} is no record ({error!r})")
        return
    if converted != record:
        migration.write(name, json.dumps(converted, indent=1).encode())


def _migrate_training_4_to_5(migration: Migration, folder: str) -> None:
    """Rename what a training holds; its model and the weights of checkpoints stay as they are."""
    store = migration.store
    files = store.sizes(folder)
    if "held.json" in files:
        _rename(migration, f"{folder}/held.json", f"{folder}/lease.json")
    if "metrics.jsonl" in files:
        _rename_metrics(migration, f"{folder}/metrics.jsonl")
    if "done.json" in files:
        _migrate_done_4_to_5(migration, f"{folder}/done.json")
    for file in store.sizes(f"{folder}/checkpoints/records"):
        _migrate_checkpoint_4_to_5(migration, f"{folder}/checkpoints", file)


def _rename_metrics(migration: Migration, name: str) -> bytes:
    """Rename metrics in a JSON-lines file, and return its new content."""
    content = old = migration.store.read(name)
    for old_name, new_name in METRIC_NAMES_5.items():
        content = content.replace(old_name, new_name)
    if content != old:
        migration.write(name, content)
    return content


def _migrate_checkpoint_4_to_5(migration: Migration, folder: str, file: str) -> None:
    """Rename the metrics in a worker's part of a checkpoint, and record their new sha256."""
    name = f"{folder}/records/{file}"
    try:
        record = json.loads(migration.store.read(name))
        digest = record["files"]["metrics.jsonl"]
        metrics = _rename_metrics(migration, f"{folder}/{record['name']}/metrics.jsonl")
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        return  # incomplete, or of a worker that writes no metrics
    original = metrics
    for old_name, new_name in METRIC_NAMES_5.items():
        original = original.replace(new_name, old_name)
    # Only an intact file gets a new sha256: a corrupt one must stay detectable.
    if digest == hashlib.sha256(original).hexdigest() and original != metrics:
        files = record["files"] | {"metrics.jsonl": hashlib.sha256(metrics).hexdigest()}
        migration.write(name, json.dumps(record | {"files": files}).encode())


STEPS: dict[int, Callable[[Migration], None]] = {4: migrate_4_to_5}
"""Migrations by the schema version that they start from. A new version adds its step here."""


def count_migrated(migration: Migration) -> Json:
    """Convert the counts of a migration to plain values."""
    counts = {name: getattr(migration, name) for name in ("data_sets", "shards", "files")}
    return {"schema_version": SCHEMA_VERSION} | counts | {"corrupt": migration.corrupt}
