"""Migrate a store to the current schema version: one step in `STEPS` for each earlier version.

A step first writes the files that belong to no data set, and then each data set: its shards, its
manifest, and last its run record, which holds the version. All names and bytes that a step writes
depend on the store's content alone. A migration that was killed is therefore resumed by running it
again, with the same result.
"""

import time
import uuid
from collections.abc import Callable

from rayfuse.config.base import UserError
from rayfuse.runtime.progress import Progress
from rayfuse.schema import SCHEMA_VERSION
from rayfuse.storage.lease import RENEW_SECONDS, TIMEOUT_SECONDS, Lease
from rayfuse.storage.manifest import check_version
from rayfuse.storage.migrate_4_to_5 import migrate_4_to_5
from rayfuse.storage.migration import Json, Migration, list_runs
from rayfuse.storage.store import Store

LEASE_FILE = "migrate.json"


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


STEPS: dict[int, Callable[[Migration], None]] = {4: migrate_4_to_5}
"""Migrations by the schema version that they start from. A new version adds its step here."""


def count_migrated(migration: Migration) -> Json:
    """Convert the counts of a migration to plain values."""
    counts = {name: getattr(migration, name) for name in ("data_sets", "shards", "files")}
    return {"schema_version": SCHEMA_VERSION} | counts | {"corrupt": migration.corrupt}
