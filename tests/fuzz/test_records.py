"""Mutated results that are no data set: read as they were written, or refused with an error."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfuse.align.task import encode_map, read_map, write_map_record
from rayfuse.capture.dtype import find_corrupt_dtype, settle_dtype
from rayfuse.config.base import UserError
from rayfuse.config.models import ModelSettings
from rayfuse.evaluate.results import read_task_nll
from rayfuse.evaluate.scores import DocumentScore, Evaluation, parse_evaluation
from rayfuse.evaluate.task_scores import SubtaskScore, TaskScore, parse_task_score
from rayfuse.run.made_models import identify_model, is_made
from rayfuse.run.segmentation import Segmentation, find_corrupt_records, write_segmentation
from rayfuse.storage.files import (
    download_files,
    find_corrupt,
    hash_bytes,
    upload_files,
    write_record,
)
from rayfuse.storage.seal import ShardError
from rayfuse.storage.store import LocalStore
from rayfuse.train.checkpoint import Checkpoints
from tests.fuzz.mutations import edits, fuzz, mutate_bytes
from tests.fuzz.test_store import open_data
from tests.train.test_checkpoint import save

Found = Iterator[tuple[str, object]]
"""What is read, by name; an error ends it."""

MAP_FILE = "maps/a-b.parquet"
SEGMENTATION_FILE = "corpus/segmentation-0123456789ab.json"
RESULT = "evaluate/fused-x/bits_per_byte.json"
TASK_RESULT = "evaluate/fused-x/arc.json"
INPUTS = {"corpus": "c0ffee"}


def write_map(store: LocalStore) -> None:
    content = encode_map(np.arange(-1, 200, dtype=np.int32))
    store.write(MAP_FILE, content)
    write_map_record(store, MAP_FILE, content)


def read_stored_map(store: LocalStore) -> Found:
    yield "map", read_map(store, MAP_FILE)


def write_results(store: LocalStore) -> None:
    documents = [DocumentScore(f"d{i}", "web", 100 + i, 71.5 * i) for i in range(3)]
    store.write(RESULT, Evaluation("fused", "fused", "m", documents, 1.5, INPUTS).to_json())
    nll = b"token NLL"
    score = SubtaskScore("arc", "acc", True, 0.5, ("q1", "q2"), (0.0, 1.0), (1.0, 1.0))
    task = TaskScore("fused", "arc", (score,), 2.5, INPUTS, hash_bytes(nll)["sha256"])
    store.write(TASK_RESULT, task.to_json())
    store.write(TASK_RESULT.replace(".json", ".parquet"), nll)


def read_results(store: LocalStore) -> Found:
    yield "bits per byte", parse_evaluation(store.read(RESULT))
    task = parse_task_score(store.read(TASK_RESULT))
    yield "task", task
    yield "nll", read_task_nll(store, TASK_RESULT.replace(".json", ".parquet"), task.nll_sha256)


def write_model(store: LocalStore) -> None:
    source = Path(store.root, "local")
    source.mkdir(parents=True)
    (source / "config.json").write_text('{"model_type": "llama"}')
    (source / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    paths = {f"model/{path.name}": path for path in source.iterdir()}
    files = upload_files(store, "train/fused-x", paths)
    shutil.rmtree(source)
    write_record(store, "train/fused-x/done.json", {"inputs": INPUTS}, files)


def read_model(store: LocalStore) -> Found:
    name = "train/fused-x/done.json"
    yield "is made", is_made(store, "train/fused-x", INPUTS)
    yield "identity", identify_model(store, "train/fused-x")
    yield "faults", list(find_corrupt(store, name))
    copy = Path(store.root, "copy")
    copy.mkdir(exist_ok=True)
    download_files(store, name, "model/", copy)
    yield "files", {path.name: path.read_bytes() for path in copy.iterdir()}


def write_small_records(store: LocalStore) -> None:
    model = ModelSettings(model="somewhere")
    write_segmentation(store, Segmentation("f00d", SEGMENTATION_FILE, (model,), ("t1",), False))
    settle_dtype(open_data(Path(store.root)), "auto", on_gpu=False)


def read_small_records(store: LocalStore) -> Found:
    yield "segmentations", list(find_corrupt_records(store))
    captured = open_data(Path(store.root))
    yield "corrupt dtype", list(find_corrupt_dtype(captured))
    yield "dtype", settle_dtype(captured, "auto", on_gpu=False)


def write_checkpoints(store: LocalStore) -> None:
    checkpoints = Checkpoints(store, "train/fused-x")
    for step in (5, 10):
        save(checkpoints, step, bits=1.5, inputs=INPUTS)


def read_checkpoints(store: LocalStore) -> Found:
    checkpoints = Checkpoints(store, "train/fused-x")
    for name, records in checkpoints.list_complete().items():
        folder = Path(store.root, "copy", name)
        if checkpoints.download(records, folder):
            files = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.pt")}
            yield name, (records, files)


Case = tuple[Callable[[LocalStore], None], Callable[[LocalStore], Found]]
CASES: dict[str, Case] = {
    "map": (write_map, read_stored_map),
    "results": (write_results, read_results),
    "model": (write_model, read_model),
    "small records": (write_small_records, read_small_records),
    "checkpoints": (write_checkpoints, read_checkpoints),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mutated_file_changes_no_value_that_is_read(name, tmp_path):
    """A value is read as it was, is missing, or names what is corrupt: `faults` and the like."""
    write, read = CASES[name]
    original = LocalStore(str(tmp_path / "original"))
    write(original)
    files = [path for path in Path(original.root).rglob("*") if path.is_file()]
    contents = {path.relative_to(original.root): path.read_bytes() for path in sorted(files)}
    wanted = dict(read(original))
    root = tmp_path / "mutated"

    @fuzz(100)
    @given(st.sampled_from(sorted(contents)), edits)
    def check(file: Path, drawn):
        mutated = mutate_bytes(contents[file], drawn)
        shutil.rmtree(root, ignore_errors=True)
        for path, content in contents.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(mutated if path == file else content)
        store = LocalStore(str(root))
        found: dict[str, object] = {}
        try:
            found.update(read(store))
        except (ShardError, UserError) as error:
            assert str(error).strip()
        names_it = any(file.as_posix() in str(value) for value in found.values())
        assert names_it or all(value == wanted[key] for key, value in found.items()), (file, found)
        outside = {path for path in tmp_path.iterdir()} - {root, Path(original.root)}
        assert not outside  # nothing is written beside the store

    check()
