"""Models that a run makes: their files are listed in `done.json`, and what they were made from."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rayfuse.models.folder import list_files
from rayfuse.run.fingerprint import fingerprint_of
from rayfuse.run.layout import Layout, TrainRun
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.files import (
    find_corrupt,
    has_all_files,
    read_record,
    upload_files,
    write_record,
)
from rayfuse.storage.seal import ShardError
from rayfuse.storage.store import Store

DONE_FILE = "done.json"


def read_inputs(layout: Layout, run: TrainRun) -> dict[str, str]:
    """Read what a training is made from: by data set, the hash of all of its shards.

    Data sets that are incomplete are missing.

    Raises:
        ShardError: A manifest is corrupt.
    """
    sets: dict[str, DataSet] = {"corpus": layout.corpus}
    if layout.has_selection:
        sets["held_out"] = layout.held_out
    if run.is_fused:
        sets |= {f"aligned {name}": data for name, data in layout.aligned.items()}
    manifests = {name: data.read_manifest() for name, data in sets.items()}
    return {name: found.content_sha256 for name, found in manifests.items() if found is not None}


def read_done(store: Store, folder: str) -> dict[str, Any] | None:
    """Read the record of a model; None while it is incomplete.

    Raises:
        ShardError: The record is corrupt.
    """
    return read_record(store, f"{folder}/{DONE_FILE}")


def store_model(store: Store, folder: str, model: Path, inputs: dict[str, str]) -> None:
    """Store a model in place of an earlier one; its record, written last, commits its files.

    Args:
        store: The store.
        folder: The model's folder below the root, which holds its record.
        model: The local folder of its files.
        inputs: What it was made from.
    """
    paths = {
        f"model/{file.relative_to(model).as_posix()}": file for file in list_files(model, ("**/*",))
    }
    store.remove(f"{folder}/{DONE_FILE}")
    files = upload_files(store, folder, paths)
    write_record(store, f"{folder}/{DONE_FILE}", {"inputs": inputs}, files)


def is_made(store: Store, folder: str, inputs: dict[str, str]) -> bool:
    """Check that a model is complete, its files have their sizes, and it is not stale.

    Args:
        store: The store of the run.
        folder: The model's folder, which holds its record.
        inputs: What it would be made from now. Inputs that are missing here or in the record are
            not compared.

    Raises:
        ShardError: The record is corrupt.
    """
    record = read_done(store, folder)
    if record is None or not has_all_files(store, f"{folder}/{DONE_FILE}", record):
        return False
    return is_current(record["inputs"], inputs)


def is_current(recorded: dict[str, str], inputs: dict[str, str]) -> bool:
    """Check that a result was made from the inputs that there are now, as far as both are known."""
    return all(recorded.get(name, value) == value for name, value in inputs.items())


def identify_model(store: Store, folder: str) -> str | None:
    """Hash the list of a model's files; None while it is incomplete.

    Raises:
        ShardError: The record is corrupt.
    """
    record = read_done(store, folder)
    if record is None:
        return None
    files = {name: file for name, file in record["files"].items() if name.startswith("model/")}
    return fingerprint_of(files=files)


def find_faults(layout: Layout, run: TrainRun) -> Iterator[tuple[str, str]]:
    """Read every file of a trained model; yield the corrupt ones, and a record that is stale."""
    return find_faults_of_model(layout.store, run.folder, lambda: read_inputs(layout, run))


def find_faults_of_model(
    store: Store, folder: str, read: Callable[[], dict[str, str]]
) -> Iterator[tuple[str, str]]:
    """Read every file of a model; yield the corrupt ones, and a record that is stale.

    Args:
        store: The store of the run.
        folder: The model's folder; there is nothing to yield if it has no record.
        read: Reads what the model would be made from now; a ShardError of it is reported elsewhere.
    """
    name = f"{folder}/{DONE_FILE}"
    faults = list(find_corrupt(store, name))
    yield from faults
    try:
        record = read_done(store, folder)
        if record and not faults and not is_current(record["inputs"], read()):
            yield name, "is stale: the model was made from other data than there is now"
    except ShardError:
        return  # the record is reported above; verifying the inputs reports theirs
