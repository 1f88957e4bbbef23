"""A merge is stored as a model is: on a disk and in object storage, its record last."""

import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from rayfuse.config.merge import MergeSettings
from rayfuse.config.models import ModelSettings
from rayfuse.merge.stage import MergeJob, write_merge
from rayfuse.merge.streamed import merge_folders
from rayfuse.run.made_models import DONE_FILE, is_made, read_done, store_model
from rayfuse.storage.seal import ShardError
from rayfuse.storage.store import Store, open_store
from tests.merge.folders import make_model, make_pivot


@pytest.fixture(params=["disk", "memory"])
def job(request: pytest.FixtureRequest, tmp_path: Path) -> MergeJob:
    """Store two trained targets, and plan their merge."""
    uri = f"memory://{uuid.uuid4().hex}/run" if request.param == "memory" else str(tmp_path / "run")
    store = open_store(uri)
    pivot = make_pivot(tmp_path / "pivot")
    models: dict[str, tuple[ModelSettings, str]] = {}
    for name in "ab":
        store_model(store, f"train/fused-{name}", make_model(pivot, tmp_path / name, ord(name)), {})
        folder = f"train/fused-{name}/model"
        models[name] = (ModelSettings(model=f"{store.root}/{folder}"), folder)
    return MergeJob(
        method="ties",
        settings=MergeSettings(),
        store=store,
        target=ModelSettings(model=str(pivot)),
        models=models,
        folder="merge/ties-0",
        inputs={"fused-a": "1"},
    )


def list_model(store: Store) -> dict[str, bytes]:
    folder = "merge/ties-0/model"
    return {name: store.read(f"{folder}/{name}") for name in store.sizes(folder)}


def test_the_stored_merge_is_that_of_the_folders(job: MergeJob, tmp_path: Path):
    write_merge(job)
    (tmp_path / "merged").mkdir()
    folders = {name: tmp_path / name for name in "ab"}
    merge_folders(
        folders, tmp_path / "pivot", tmp_path / "merged", method="ties", settings=job.settings
    )
    expected = {file.name: file.read_bytes() for file in (tmp_path / "merged").iterdir()}
    assert list_model(job.store) == expected
    assert is_made(job.store, job.folder, {"fused-a": "1"})
    assert not is_made(job.store, job.folder, {"fused-a": "2"})  # it was trained again
    record = read_done(job.store, job.folder)
    assert record is not None
    written = job.store.read(f"{job.folder}/{DONE_FILE}")
    write_merge(replace(job, models={}))  # of another job: nothing is merged again
    assert job.store.read(f"{job.folder}/{DONE_FILE}") == written
    assert set(record["files"]) == {f"model/{name}" for name in expected}


def test_a_corrupt_target_is_not_merged(job: MergeJob):
    name = "train/fused-b/model/model.safetensors"
    content = job.store.read(name)
    job.store.write(name, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ShardError, match=r"fused-b/model/model\.safetensors"):
        write_merge(job)
    assert not job.store.sizes("merge/ties-0/model")


def test_a_merge_that_stops_while_it_is_replaced_is_incomplete(
    job: MergeJob, monkeypatch: pytest.MonkeyPatch
):
    write_merge(job)

    def fail(self: object, path: str, name: str) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(type(job.store), "upload", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        write_merge(replace(job, inputs={"fused-a": "2"}))  # it was trained again
    assert read_done(job.store, job.folder) is None
    assert DONE_FILE not in job.store.sizes(job.folder)
