"""`rayfuse clean`: list what no recipe uses, with bytes and cost, and remove it if wanted."""

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.clean.cost import ItemCost, read_cost
from rayfuse.clean.used import list_scored, list_used
from rayfuse.config.base import UserError
from rayfuse.config.recipe import Recipe
from rayfuse.run.failed_sources import drop_sources, plan_run
from rayfuse.run.layout import Layout, plan_layout
from rayfuse.storage.items import (
    LEASE_FILE,
    StoredItem,
    is_folder_complete,
    list_open,
    list_stored,
    remove_item,
)
from rayfuse.storage.lease import RENEW_SECONDS, TIMEOUT_SECONDS, Lease
from rayfuse.storage.migrate import LEASE_FILE as MIGRATION_LEASE
from rayfuse.storage.seal import ShardError
from rayfuse.storage.store import Store

POLL_SECONDS = 1.0
"""Between two attempts to acquire the lease of a training."""


@dataclass(frozen=True)
class UnusedItem:
    """An item that no recipe uses."""

    item: StoredItem
    cost: ItemCost
    writer: str = ""
    """Why a job may be at work on it; empty if none is."""


@dataclass(frozen=True)
class BusyItem:
    """An item that a job may be at work on: one that no recipe uses, or one that jobs share."""

    name: str
    writer: str
    """Why a job may be."""
    is_training: bool
    is_used: bool
    """Whether a given recipe uses it; the job may be of another that shares it."""


def clean_storage(
    recipes: Sequence[Recipe], console: Console, *, delete: bool, idle_hours: float
) -> dict[str, Any]:
    """List what none of the recipes uses in their storage, and remove it if wanted.

    Args:
        recipes: All recipes whose results are kept; they have one storage.
        console: Where the list is printed.
        delete: Remove the items.
        idle_hours: An incomplete data set that was written to more recently may be the work of a
            job.

    Returns:
        The items as plain values, and the bytes that were removed.

    Raises:
        UserError: `idle_hours` is negative, a recipe cannot be used, the storages differ, the
            storage has another schema version, or, with `delete`, a job may be at work on anything
            in the storage, which a recipe that is not given may share.
        ShardError: A record that names folders is corrupt.
    """
    if not idle_hours >= 0:  # NaN is neither
        raise UserError(f"--idle-hours is {idle_hours}; give 0 or more")
    runs = [run for recipe in recipes for run in _list_runs(recipe)]
    roots = sorted({layout.store.root for _, layout in runs})
    if len(roots) > 1:
        raise UserError(
            f"the recipes have different storages, {', '.join(roots)}; clean one at a time"
        )
    used: set[str] = set()
    scored: set[str] = set()
    for recipe, layout in runs:
        used |= list_used(recipe, layout)
        scored |= list_scored(layout)
    store, plan = runs[0][1].store, recipes[0].plan
    unused = [
        UnusedItem(item, read_cost(store, item, plan), _find_writer(store, item, idle_hours))
        for item in list_stored(store, lambda name: name in used)
    ]
    print_unused(store, unused, console)
    removed: list[StoredItem] = []
    if delete and any(not found.item.kept for found in unused):
        busy = _list_busy(store, unused, used, scored, idle_hours)
        removed = _remove_unused(store, unused, busy, console)
    if unused and not delete:
        console.print("nothing was removed; --delete removes what is marked unused")
    return {
        "storage": store.root,
        "items": [_to_values(found) for found in unused],
        "removed": [item.name for item in removed],
        "removed_bytes": sum(item.num_bytes for item in removed),
    }


def _list_runs(recipe: Recipe) -> Iterator[tuple[Recipe, Layout]]:
    """Yield a recipe's run, and the one without the sources whose capture has failed."""
    yield recipe, plan_layout(recipe, ALIGN_FACTS)
    rest = plan_run(recipe, ALIGN_FACTS)
    if rest.failed:
        yield drop_sources(recipe, rest.failed), rest


def _find_writer(store: Store, item: StoredItem, idle_hours: float) -> str:
    """Describe why a job may be at work on an item; nothing if none is."""
    if item.is_training:
        return _find_holder(store, item.name)
    is_written = item.files or item.kept
    if item.is_complete or not is_written or not idle_hours:
        return ""
    if item.kept and is_folder_complete(store, item.name):  # a link, whose files are not listed
        return ""
    if item.changed_at is None:
        return "it is incomplete, and when it was written is not known"
    minutes = max(time.time() - item.changed_at, 0.0) / 60
    return f"it was written {minutes:.0f} minutes ago" if minutes < idle_hours * 60 else ""


def _find_holder(store: Store, name: str) -> str:
    try:
        holder = Lease(store, f"{name}/{LEASE_FILE}", "").find_holder()
    except ShardError:  # behind a link that leads out of the storage: no job can train there
        return ""
    return f"{holder} holds its lease" if holder else ""


def _list_busy(
    store: Store, unused: list[UnusedItem], used: set[str], scored: set[str], idle_hours: float
) -> list[BusyItem]:
    """List all that a job may be at work on.

    What a given recipe uses is included: another recipe may share it, and have the job, whose other
    results would then be removed.
    """
    busy = [
        BusyItem(found.item.name, found.writer, found.item.is_training, is_used=False)
        for found in unused
        if found.writer
    ]
    for item in list_open(store, lambda name: name in used and name not in scored):
        if writer := _find_writer(store, item, idle_hours):
            busy.append(BusyItem(item.name, writer, item.is_training, is_used=True))
    return busy


def _remove_unused(
    store: Store, unused: list[UnusedItem], busy: list[BusyItem], console: Console
) -> list[StoredItem]:
    """Remove the items that can be removed, and return them.

    Raises:
        UserError: A job may be at work; then nothing is removed.
    """
    items = [found.item for found in unused if not found.item.kept]
    _check_writers(store, busy)
    trainings = {item.name for item in items if item.is_training}
    trainings |= {item.name for item in busy if item.is_training}
    with _hold_leases(store, sorted(trainings)) as leases:
        for item in items:

            def renew() -> None:
                for lease in leases.values():
                    lease.renew()

            remove_item(store, item, renew)
            if item.is_training:
                leases.pop(item.name).release()
                store.remove_empty(item.name)
            console.print(f"removed {item.name} ({_format_bytes(item.num_bytes)})")
    freed = _format_bytes(sum(item.num_bytes for item in items))
    console.print(f"removed {len(items)} items, {freed}")
    return items


def _check_writers(store: Store, busy: list[BusyItem]) -> None:
    """Check that no job is known to be at work on a data set; leases are checked later.

    Its inputs are complete, and may be among what is to be removed, so nothing is removed then.

    Raises:
        UserError: One may be.
    """
    migration = Lease(store, MIGRATION_LEASE, "").find_holder()
    if migration is not None:
        raise UserError(f"{migration} migrates {store.root}; wait for its end")
    for item in busy:
        if not item.is_training:
            remedy = "wait" if item.is_used else "give its recipe too, or wait"
            raise UserError(
                f"{item.name}: {item.writer}, so that a job of a recipe that is not given may be "
                f"at work; nothing was removed: {remedy}; if no job runs, set --idle-hours 0"
            )


@contextmanager
def _hold_leases(store: Store, trainings: list[str]) -> Iterator[dict[str, Lease]]:
    """Hold the leases of trainings, so that no job starts one while results are removed.

    A lease that is not renewed for its timeout belongs to a process that has died.

    Raises:
        UserError: Another process holds one.
    """
    job = uuid.uuid4().hex
    leases = {name: Lease(store, f"{name}/{LEASE_FILE}", job) for name in trainings}
    until = time.monotonic() + TIMEOUT_SECONDS + RENEW_SECONDS
    try:
        while missing := [lease for lease in leases.values() if not lease.acquire()]:
            if time.monotonic() > until:
                raise UserError(
                    f"{missing[0].holder} trains {missing[0].file.rpartition('/')[0]}, and its "
                    "job may need results that no given recipe names; nothing was removed: wait "
                    "for its end"
                )
            for lease in leases.values():
                lease.renew()
            time.sleep(POLL_SECONDS)
        yield leases
    finally:
        for lease in leases.values():
            lease.release()


def print_unused(store: Store, unused: list[UnusedItem], console: Console) -> None:
    """Print a table of the items, with their bytes and what they cost to make."""
    if not unused:
        console.print(f"{store.root} holds nothing that the recipes do not use")
        return
    longest = max(len(found.item.name) for found in unused)  # names are never shortened
    table = Table(Column("item", min_width=longest), title=store.root)
    for name in ("bytes", "worker hours", "dollars", "state"):
        table.add_column(name)
    for found in unused:
        seconds, dollars = found.cost.worker_seconds, found.cost.dollars
        table.add_row(
            found.item.name,
            _format_bytes(found.item.num_bytes),
            "unknown" if seconds is None else f"{seconds / 3600:,.3f}",
            "unknown" if dollars is None else f"${dollars:,.2f}",
            _describe_state(found),
        )
    console.print(table)
    removable = sum(found.item.num_bytes for found in unused if not found.item.kept)
    console.print(f"unused: {_format_bytes(removable)}", highlight=False)


def _describe_state(found: UnusedItem) -> str:
    if found.item.kept:
        return f"kept: {found.item.kept}"
    if found.writer:
        return f"perhaps in use: {found.writer}"
    return "unused" if found.item.is_complete else "unused, incomplete"


def _format_bytes(number: int) -> str:
    return f"{number:,} B" if number < 10**6 else f"{number / 10**6:,.1f} MB"


def _to_values(found: UnusedItem) -> dict[str, Any]:
    item = found.item
    return {
        "name": item.name,
        "bytes": item.num_bytes,
        "is_complete": item.is_complete,
        **asdict(found.cost),
        "kept": item.kept,
        "perhaps_in_use": found.writer,
    }
