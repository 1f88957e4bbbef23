"""What is stored under a root, item by item: data sets, trainings, maps and results of evaluations.

Everything is found by the names that stages give, `NAME-FINGERPRINT`; other files are none of ours.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from rayfuse.config.base import first_line
from rayfuse.config.merge import METHODS
from rayfuse.storage.listing import NUM_READERS
from rayfuse.storage.manifest import decode_run
from rayfuse.storage.object_store import check_name
from rayfuse.storage.seal import ShardError
from rayfuse.storage.store import Store

FINGERPRINTED = re.compile(r"(?:(?P<name>.+)-)?(?P<fingerprint>[0-9a-f]{12})")
RESULT_FILE = re.compile(r"(?P<stem>.+-[0-9a-f]{12})\.(?:json|parquet)")

DATA_SETS = ("corpus", "captured", "aligned", "evaluate")
MODELS = {
    "train": ("fused", "clm"),
    "evaluate": ("merged-model",),
    "merge": tuple(METHODS),
}
"""The models that are made, by folder."""

FOLDERS = (*DATA_SETS, "train", "merge")
FILES = ("maps", "evaluate", "merge")
"""Where items are folders, and where they are single files."""

COMPLETE = ("manifest.json", "done.json")
LEASE_FILE = "lease.json"
RUN_FILE = "run.json"


@dataclass(frozen=True)
class StoredItem:
    """A data set, a model with its checkpoints, a vocabulary map, or a result of an evaluation."""

    name: str
    """Its folder below the root, or its file there without the suffix."""
    files: dict[str, int]
    """Bytes of each file, by its name below the root."""
    is_folder: bool
    is_data_set: bool = False
    changed_at: float | None = None
    """When its newest file was written, in seconds since 1970; None if unknown, as behind links."""
    kept: str = ""
    """Why it cannot be removed; empty if it can."""

    @property
    def num_bytes(self) -> int:
        """The bytes of its files."""
        return sum(self.files.values())

    @property
    def stage(self) -> str:
        """The folder of its stage."""
        return self.name.partition("/")[0]

    @property
    def is_complete(self) -> bool:
        """Whether the record that completes it exists. Single files are always complete."""
        return not self.is_folder or any(f"{self.name}/{name}" in self.files for name in COMPLETE)

    @property
    def is_training(self) -> bool:
        """Whether it is a training, which a job that works on it holds the lease of."""
        return self.stage == "train"


def list_stored(store: Store, is_used: Callable[[str], bool]) -> Iterator[StoredItem]:
    """Yield what is stored and not in use. Links are not followed.

    Args:
        store: The store.
        is_used: Whether an item, by its name, is in use: then its files are not listed.

    Raises:
        UserError: A data set has another schema version.
    """
    for stage in FOLDERS:
        for folder in store.folders(stage):
            found = FINGERPRINTED.fullmatch(folder)
            if found is None or is_used(f"{stage}/{folder}"):
                continue
            for item in _list_folder(store, f"{stage}/{folder}", found):
                if item.files or store.is_local:  # else an object that shows an empty folder
                    yield item
    for stage in FILES:
        for name, sizes in _group_files(store, stage).items():
            if not is_used(name):
                yield StoredItem(name, sizes, is_folder=False)


def list_open(store: Store, is_used: Callable[[str], bool]) -> Iterator[StoredItem]:
    """Yield what is in use and may be written now: trainings, without files, and open data sets.

    Args:
        store: The store.
        is_used: Whether an item, by its name, is in use.
    """
    for stage in FOLDERS:
        for folder in store.folders(stage):
            name = f"{stage}/{folder}"
            if FINGERPRINTED.fullmatch(folder) is None or not is_used(name):
                continue
            if stage == "train":
                yield StoredItem(name, {}, is_folder=True)
            elif not is_folder_complete(store, name):
                yield _read_folder(store, name, is_data_set=stage in DATA_SETS)


def is_folder_complete(store: Store, name: str) -> bool:
    """Check that the record that completes a folder exists; the folder may be a link."""
    return any(file in COMPLETE for file in store.sizes(name))


def _list_folder(store: Store, name: str, found: re.Match[str]) -> Iterator[StoredItem]:
    stage = name.partition("/")[0]
    if found["name"] in MODELS.get(stage, ()):
        yield _read_folder(store, name, is_data_set=False)
    elif stage in DATA_SETS:
        yield from _list_data_set(store, name, found["fingerprint"])


def _group_files(store: Store, stage: str) -> dict[str, dict[str, int]]:
    """List the bytes of single files by item, then by name below the root."""
    groups: dict[str, dict[str, int]] = {}
    for file, size in sorted(store.sizes(stage).items()):
        if found := RESULT_FILE.fullmatch(file):
            groups.setdefault(f"{stage}/{found['stem']}", {})[f"{stage}/{file}"] = size
    return groups


def _list_data_set(store: Store, name: str, fingerprint: str) -> Iterator[StoredItem]:
    """Yield a data set, if its run record shows that it is one, or if it is empty.

    Raises:
        UserError: It has another schema version.
    """
    item = _read_folder(store, name, is_data_set=True)
    path = f"{item.name}/{RUN_FILE}"
    if item.kept or not item.files:
        yield item
    elif path in item.files:
        try:
            recorded = decode_run(store.read(path), f"{store.root}/{path}", store.root)
        except ShardError as error:
            yield _keep(item, first_line(error))
            return
        if recorded.get("fingerprint") == fingerprint:
            yield item


def _read_folder(store: Store, name: str, *, is_data_set: bool) -> StoredItem:
    tree = store.walk(name)
    files = {f"{name}/{file}": size for file, size in tree.sizes.items()}
    item = StoredItem(name, files, True, is_data_set, tree.changed_at)
    if not tree.links:
        return item
    link = f"{name}/{tree.links[0]}".rstrip("/")
    item = replace(item, changed_at=None)
    return _keep(item, f"{link} is a link, which is not followed: remove it by hand")


def _keep(item: StoredItem, reason: str) -> StoredItem:
    return replace(item, kept=reason)


def remove_item(store: Store, item: StoredItem, after_file: Callable[[], None]) -> None:
    """Remove an item: the records that complete it first, and the one that identifies it last.

    A removal that is killed leaves an incomplete item, which is found and removed by the next one,
    and which no reader takes for complete.

    Args:
        store: The store.
        item: The item. A lease in it is the caller's, and stays.
        after_file: Called after each file.

    Raises:
        ShardError: A name leads out of the storage; then nothing is removed.
    """
    for file in item.files:
        check_name(file, store.root)
    ranks: Mapping[int, list[str]] = {rank: [] for rank in range(4)}
    for file in item.files:
        if file == f"{item.name}/{LEASE_FILE}":
            continue
        ranks[_rank(file.removeprefix(f"{item.name}/"), item)].append(file)
    with ThreadPoolExecutor(NUM_READERS) as removers:
        for files in ranks.values():
            for _ in removers.map(store.remove, files):
                after_file()
    if item.is_folder:
        store.remove_empty(item.name)


def _rank(file: str, item: StoredItem) -> int:
    """Rank a file by when it is removed: what completes an item, its records, content, identity."""
    if not item.is_folder:
        return 0 if file.endswith(".json") else 2
    if file in COMPLETE:
        return 0
    if file == RUN_FILE:
        return 3
    return 1 if file.startswith(("commits/", "checkpoints/records/", "records-")) else 2
