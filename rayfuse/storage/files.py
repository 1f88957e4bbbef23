"""Results that are no data set: a sealed record lists their files with size and sha256.

Such are models, vocabulary maps and reports. The record is written last, so it commits the files.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rayfuse.storage.object_store import check_name
from rayfuse.storage.seal import REMEDY, ShardError, seal, unseal
from rayfuse.storage.store import Store, hash_file

FileHashes = dict[str, dict[str, Any]]
"""By name below the record's folder: `num_bytes` and `sha256`."""


def upload_files(store: Store, folder: str, paths: Mapping[str, Path]) -> FileHashes:
    """Upload local files, and return their list for a record.

    Args:
        store: The store.
        folder: The folder of the record.
        paths: The local files by their names below that folder.
    """
    hashes: FileHashes = {}
    for name, path in sorted(paths.items()):
        store.upload(str(path), f"{folder}/{name}")
        hashes[name] = {"num_bytes": path.stat().st_size, "sha256": hash_file(path)}
    return hashes


def hash_bytes(content: bytes) -> dict[str, Any]:
    """Compute what a record lists of a file with these bytes."""
    return {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_record(store: Store, name: str, values: dict[str, Any], files: FileHashes) -> None:
    """Write a record of files that are all stored.

    Args:
        store: The store.
        name: The record's; the files' names are relative to its folder.
        values: What else it holds.
        files: The files.
    """
    store.write(name, seal(values | {"files": files}))


def read_record(store: Store, name: str) -> dict[str, Any] | None:
    """Read a record; None if there is none.

    Raises:
        ShardError: It is corrupt.
    """
    try:
        data = store.read(name)
    except FileNotFoundError:
        return None
    record = unseal(data, f"{store.root}/{name}")
    if not isinstance(record.get("files"), dict):
        raise ShardError(f"{store.root}/{name} lists no files; {REMEDY}")
    for file in record["files"]:
        try:
            check_name(file, store.root)
        except ShardError as error:  # the record is at fault: its files are never touched
            raise ShardError(f"{store.root}/{name} is corrupt: {error}") from error
    return record


def has_all_files(store: Store, name: str, record: Mapping[str, Any]) -> bool:
    """Check from listings alone that the files of a record exist and have their sizes."""
    folder = name.rpartition("/")[0]
    listings: dict[str, dict[str, int]] = {}
    for file, expected in record["files"].items():
        parent, _, base = f"{folder}/{file}".rpartition("/")
        if parent not in listings:
            listings[parent] = store.sizes(parent)
        if listings[parent].get(base) != expected["num_bytes"]:
            return False
    return True


def find_corrupt(store: Store, name: str) -> Iterator[tuple[str, str]]:
    """Read every file of a record; yield the names of corrupt ones, each with the reason.

    Args:
        store: The store.
        name: The record's name. There is nothing to yield if there is none.
    """
    try:
        record = read_record(store, name)
    except ShardError as error:
        yield name, str(error)
        return
    folder = name.rpartition("/")[0]
    for file, expected in (record or {"files": {}})["files"].items():
        path = f"{folder}/{file}"
        try:
            if store.hash_file(path) != expected["sha256"]:
                yield path, "sha256 differs"
        except FileNotFoundError:
            yield path, "is missing"
        except ShardError as error:
            yield path, str(error)


def read_listed(store: Store, name: str, file: str) -> bytes:
    """Read a small file of a record, and check every byte of it.

    Args:
        store: The store.
        name: The record's name.
        file: The file's name as the record lists it.

    Raises:
        FileNotFoundError: There is no record.
        ShardError: The record or the file is missing or corrupt.
    """
    record = read_record(store, name)
    path = f"{name.rpartition('/')[0]}/{file}"
    if record is None:
        raise FileNotFoundError(f"{store.root}/{name}")
    try:
        content = store.read(path)
    except FileNotFoundError as error:
        raise ShardError(f"{store.root}/{path} is missing; {REMEDY}") from error
    if hash_bytes(content) != record["files"].get(file):
        raise ShardError(f"{store.root}/{path} is not what was written; {REMEDY}")
    return content


def check_files(store: Store, name: str) -> None:
    """Check a record and every byte of its files.

    Raises:
        ShardError: The record or a file is missing or corrupt.
    """
    for file, reason in find_corrupt(store, name):
        raise ShardError(f"{store.root}/{file}: {reason}; {REMEDY}")


def download_files(store: Store, name: str, prefix: str, path: Path) -> None:
    """Copy files of a record into an existing local folder, and check every byte of them.

    They are streamed to disk: weight files are often larger than a worker's memory.

    Args:
        store: The store.
        name: The record's name.
        prefix: Only files whose names begin with it are copied, under the rest of their names.
        path: The local folder.

    Raises:
        ShardError: The record or a file is missing or corrupt.
    """
    record = read_record(store, name)
    if record is None:
        raise ShardError(f"{store.root}/{name} is missing; {REMEDY}")
    for file, expected in record["files"].items():
        if not file.startswith(prefix):
            continue
        local, stored = path / file.removeprefix(prefix), f"{name.rpartition('/')[0]}/{file}"
        local.parent.mkdir(parents=True, exist_ok=True)
        try:
            store.download(stored, str(local))
        except FileNotFoundError as error:
            raise ShardError(f"{store.root}/{stored} is missing; {REMEDY}") from error
        if hash_file(local) != expected["sha256"]:
            raise ShardError(f"{store.root}/{stored} is corrupt; {REMEDY}")
