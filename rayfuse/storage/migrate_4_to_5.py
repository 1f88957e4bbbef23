"""The step from schema version 4 to 5: names change, and records get checksums.

Columns and fingerprints are those of version 4. What was stored without a checksum gets one of what
is there now; what was not recorded, such as the inputs of a shard, stays unknown.
"""

import hashlib
import json
from typing import Any

from rayfuse.storage.files import FileHashes, write_record
from rayfuse.storage.migration import Json, Migration, migrate_data_sets
from rayfuse.storage.seal import is_sealed, seal
from rayfuse.storage.store import Store

RECIPE_KEYS_5 = {"storage_patience_seconds": "storage_retry_seconds"}

CORPUS_KEYS_5 = {"recut": "resplit"}

ALIGN_METHODS_5 = {"mined": "min_edit_distance", "statistics": "cooccurrence"}

METRIC_NAMES_5 = {b'"utilisation":': b'"mfu":', b'"storage_repeats":': b'"storage_retries":'}


def migrate_4_to_5(migration: Migration) -> None:
    """Rename keys and files, and write the records of what is no data set with checksums."""
    store = migration.store
    for prefix in ("", "held-out-"):
        for file in store.sizes("corpus", f"{prefix}kept-"):
            new = f"{prefix}segmentation-{file.removeprefix(f'{prefix}kept-')}"
            _rename_sealed(migration, f"corpus/{file}", f"corpus/{new}")
    for folder in store.folders("captured"):
        _migrate_capture_metrics(migration, f"captured/{folder}")
    for folder in store.folders("train"):
        _migrate_training(migration, f"train/{folder}")
    for folder in store.folders("evaluate"):
        if folder.startswith("merged-model-") and "done.json" in store.sizes(f"evaluate/{folder}"):
            _migrate_done(migration, f"evaluate/{folder}/done.json")
    for file in store.sizes("evaluate"):
        if file.endswith(".json"):
            _migrate_result(migration, f"evaluate/{file}")
    _migrate_maps(migration)
    store.remove("report/findings.json")  # the report is written again from what is there
    migrate_data_sets(migration, 4, convert_recipe)


def convert_recipe(recipe: Json) -> Json:
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


def _read_unsealed(migration: Migration, name: str) -> Json | None:
    """Read a JSON file of version 4; None for one that is migrated already, or corrupt."""
    content = migration.store.read(name)
    if is_sealed(content):
        return None
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        migration.corrupt.append(f"{migration.store.root}/{name} is no record ({error!r})")
        return None
    if not isinstance(record, dict):
        migration.corrupt.append(f"{migration.store.root}/{name} is no record")
        return None
    return record


def _rename_sealed(migration: Migration, old: str, new: str) -> None:
    record = _read_unsealed(migration, old)
    if record is not None:
        migration.write(new, seal(record))
        migration.store.remove(old)


def _rename_metrics(content: bytes) -> bytes:
    for old_name, new_name in METRIC_NAMES_5.items():
        content = content.replace(old_name, new_name)
    return content


def _migrate_capture_metrics(migration: Migration, folder: str) -> None:
    name = f"{folder}/metrics.jsonl"
    if "metrics.jsonl" not in migration.store.sizes(folder):
        return
    content = migration.store.read(name)
    try:
        records = [json.loads(line) for line in _rename_metrics(content).splitlines()]
        lines = [
            line if is_sealed(line) else seal(record, indent=None)
            for line, record in zip(content.splitlines(), records, strict=True)
        ]
    except (ValueError, TypeError) as error:
        migration.corrupt.append(f"{migration.store.root}/{name} is corrupt ({error!r})")
        return
    if lines != content.splitlines():
        migration.write(name, b"".join(line + b"\n" for line in lines))


def _migrate_maps(migration: Migration) -> None:
    present = migration.store.sizes("maps")
    for file in present:
        stem = file.removesuffix(".parquet")
        if stem != file and f"{stem}.json" not in present:
            files = _hash_files(migration.store, "maps", [file])
            write_record(migration.store, f"maps/{stem}.json", {}, files)
            migration.files += 1


def _migrate_result(migration: Migration, name: str) -> None:
    """Write a score with a checksum, and with that of the token NLL beside a task's score."""
    record = _read_unsealed(migration, name)
    if record is None:
        return
    extra: dict[str, Any] = {"inputs": {}}
    if "subtasks" in record:
        nll_file = f"{name.removesuffix('.json')}.parquet"
        is_there = nll_file.removeprefix("evaluate/") in migration.store.sizes("evaluate")
        extra["nll_sha256"] = migration.store.hash_file(nll_file) if is_there else ""
    migration.write(name, seal(record | extra))


def _hash_files(store: Store, folder: str, names: list[str]) -> FileHashes:
    sizes = {
        f"{part}{name}": size
        for part in ("", "model/")
        for name, size in store.sizes(f"{folder}/{part}".rstrip("/")).items()
    }
    return {
        name: {"num_bytes": sizes[name], "sha256": store.hash_file(f"{folder}/{name}")}
        for name in names
        if name in sizes
    }


def _migrate_done(migration: Migration, name: str) -> None:
    """List a model's files in its record; the model card is the report's."""
    record, folder = _read_unsealed(migration, name), name.removesuffix("/done.json")
    if record is None:
        return
    if "recipe" in record:
        record["recipe"] = convert_recipe(record["recipe"])
    names = [f"model/{file}" for file in migration.store.sizes(f"{folder}/model")]
    names = [name for name in names if name != "model/README.md"] + ["metrics.jsonl"]
    files = _hash_files(migration.store, folder, names)
    write_record(migration.store, name, record | {"inputs": {}}, files)
    migration.files += 1


def _migrate_training(migration: Migration, folder: str) -> None:
    """Rename what a training holds; its model and the weights of checkpoints stay as they are."""
    store = migration.store
    files = store.sizes(folder)
    if "held.json" in files:
        migration.write(f"{folder}/lease.json", store.read(f"{folder}/held.json"))
        store.remove(f"{folder}/held.json")
    if "metrics.jsonl" in files:
        content = store.read(f"{folder}/metrics.jsonl")
        if _rename_metrics(content) != content:
            migration.write(f"{folder}/metrics.jsonl", _rename_metrics(content))
    if "done.json" in files:
        _migrate_done(migration, f"{folder}/done.json")
    for file in store.sizes(f"{folder}/checkpoints/records"):
        _migrate_checkpoint(migration, f"{folder}/checkpoints", file)


def _migrate_checkpoint(migration: Migration, folder: str, file: str) -> None:
    """Write a worker's part of a checkpoint with its rank, and its metrics with their new names."""
    name, rank = f"{folder}/records/{file}", file.removesuffix(".json").rpartition("-")[2]
    if not rank.isdecimal():
        return  # the mark of a start
    record = _read_unsealed(migration, name)
    if record is None:
        return
    files = record.get("files")
    if isinstance(files, dict) and "metrics.jsonl" in files:
        metrics_name = f"{folder}/{file.rpartition('-')[0]}/metrics.jsonl"
        digest = _migrate_checkpoint_metrics(migration, metrics_name, files["metrics.jsonl"])
        record["files"] = files | {"metrics.jsonl": digest}
    migration.write(name, seal(record | {"rank": int(rank), "inputs": {}}))


def _migrate_checkpoint_metrics(migration: Migration, name: str, digest: str) -> str:
    """Rename the metrics of a checkpoint, and return their new sha256.

    Only an intact file gets a new one: a corrupt one must stay detectable.
    """
    try:
        content = migration.store.read(name)
    except FileNotFoundError:
        return digest
    renamed = original = _rename_metrics(content)
    for old_name, new_name in METRIC_NAMES_5.items():
        original = original.replace(new_name, old_name)
    if renamed != content:
        migration.write(name, renamed)
    is_intact = digest == hashlib.sha256(original).hexdigest()
    return hashlib.sha256(renamed).hexdigest() if is_intact else digest
