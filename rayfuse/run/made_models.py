"""Models that a run makes: their files are listed in `done.json`, and what they were made from."""

from typing import Any

from rayfuse.run.fingerprint import fingerprint_of
from rayfuse.run.layout import Layout, TrainRun
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.files import has_all_files, read_record
from rayfuse.storage.store import Store

DONE_FILE = "done.json"


def read_inputs(layout: Layout, run: TrainRun) -> dict[str, str]:
    """Read what a training is made from: by data set, the hash of all of its shards.

    Data sets that are incomplete are missing.

    Raises:
        ShardError: A manifest is corrupt.
    """
    sets: dict[str, DataSet] = {"corpus": layout.corpus}
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
