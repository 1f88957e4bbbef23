"""`rayfuse clean` removes nothing while a job may be at work."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayfuse.clean import command
from rayfuse.config.base import UserError
from rayfuse.storage.lease import Lease
from rayfuse.storage.seal import seal
from rayfuse.storage.store import open_store
from tests.clean.storages import (
    OTHER,
    aligned_folders,
    clean,
    layout_of,
    snapshot,
    start_capture,
    start_training,
)


def test_a_data_set_that_a_job_may_be_writing_stops_all_removal(recipe):
    data = start_capture(recipe)
    before = snapshot(recipe)
    with pytest.raises(UserError, match=rf"{data.folder}: it was written 0 minutes ago, so that"):
        clean(recipe)
    assert snapshot(recipe) == before
    assert clean(recipe, recipe, "capture.top_k=3", recipe, OTHER)["removed"] == []
    assert data.folder in clean(recipe, idle_hours=0.0)["removed"]


@pytest.mark.parametrize("is_complete", [True, False])
def test_a_shared_training_that_a_job_works_on_stops_all_removal(recipe, monkeypatch, is_complete):
    monkeypatch.setattr(command, "TIMEOUT_SECONDS", -9.0)
    layout = layout_of(recipe)
    (baseline,) = [run.folder for run in layout.runs if "/clm-" in run.folder]
    other = [run.folder for run in layout_of(recipe, "train.lambda=0.5").runs]
    (finished,) = [folder for folder in other if folder != baseline]
    layout.store.write(f"{finished}/done.json", b"{}")
    if is_complete:
        layout.store.write(f"{baseline}/done.json", b"{}")
    lease = Lease(layout.store, f"{baseline}/lease.json", "job of the other recipe")
    assert lease.acquire()
    before = snapshot(recipe)
    with pytest.raises(UserError, match=rf"process {os.getpid()} of .* trains {baseline}"):
        clean(recipe)
    assert snapshot(recipe) == before
    assert clean(recipe, recipe, OTHER, recipe, "train.lambda=0.5")["removed"] == []
    lease.release()
    assert finished in clean(recipe)["removed"]
    assert ("done.json" in layout.store.sizes(baseline)) == is_complete


def test_a_shared_data_set_that_a_job_may_be_writing_stops_all_removal(recipe):
    data = layout_of(recipe).captured["neox"]
    data.store.remove(f"{data.folder}/manifest.json")
    before = snapshot(recipe)
    with pytest.raises(UserError, match=rf"{data.folder}: it was written \d+ minutes ago.*: wait;"):
        clean(recipe)
    assert snapshot(recipe) == before
    assert clean(recipe, recipe, OTHER)["removed"] == []
    assert clean(recipe, idle_hours=0.0)["removed"] == aligned_folders(recipe, OTHER)


def test_the_token_nll_of_a_source_that_is_scored_stops_nothing(recipe):
    layout = layout_of(recipe)
    data = layout.evaluation.token_nll["neox"]
    data.claim({"recipe": {}})
    with pytest.raises(UserError, match=f"{data.folder}: it was written 0 minutes ago"):
        clean(recipe)
    layout.store.write(layout.evaluation.scores["neox"], seal({"seconds": 36.0}))
    assert clean(recipe)["removed"] == aligned_folders(recipe, OTHER)


def test_a_training_with_a_link_whose_lease_is_held_stops_all_removal(recipe, monkeypatch):
    monkeypatch.setattr(command, "TIMEOUT_SECONDS", -9.0)
    folder = start_training(recipe)
    store = open_store(str(Path(recipe).with_name("storage")))
    (Path(store.root) / folder / "latest").symlink_to("metrics.jsonl")
    lease = Lease(store, f"{folder}/lease.json", "x")
    assert lease.acquire()
    before = snapshot(recipe)
    with pytest.raises(UserError, match=f"trains {folder}"):
        clean(recipe)
    assert snapshot(recipe) == before
    lease.release()
    assert clean(recipe)["removed"] == aligned_folders(recipe, OTHER)


@pytest.mark.parametrize("link", ["", "commits"])
def test_an_incomplete_data_set_behind_a_link_stops_all_removal(recipe, link):
    data = start_capture(recipe)
    place = Path(recipe).with_name("storage") / data.folder / link
    moved = Path(recipe).with_name("storage") / "moved"
    shutil.move(place, moved)
    place.symlink_to(moved)
    before = snapshot(recipe)
    with pytest.raises(UserError, match=f"{data.folder}: it is incomplete, and when it was"):
        clean(recipe)
    assert snapshot(recipe) == before
    assert clean(recipe, idle_hours=0.0)["removed"] == aligned_folders(recipe, OTHER)


def test_a_training_that_is_a_link_out_of_the_storage_is_kept(recipe, tmp_path):
    folder = start_training(recipe)
    place = tmp_path / "storage" / folder
    shutil.move(place, tmp_path / "moved")
    place.symlink_to(tmp_path / "moved")
    assert clean(recipe)["removed"] == aligned_folders(recipe, OTHER)
    assert (tmp_path / "moved" / "metrics.jsonl").is_file()


def test_an_incomplete_data_set_of_yesterday_is_removed(recipe):
    data = start_capture(recipe)
    yesterday = time.time() - 86400
    for path in (Path(recipe).with_name("storage") / data.folder).rglob("*"):
        os.utime(path, (yesterday, yesterday))
    assert data.folder in clean(recipe)["removed"]


def test_a_training_whose_lease_is_held_stops_all_removal_until_it_is_released(recipe, monkeypatch):
    monkeypatch.setattr(command, "TIMEOUT_SECONDS", -9.0)
    folder = start_training(recipe)
    lease = Lease(open_store(str(Path(recipe).with_name("storage"))), f"{folder}/lease.json", "x")
    assert lease.acquire()
    before = snapshot(recipe)
    listed = {item["name"]: item for item in clean(recipe, delete=False)["items"]}
    assert f"process {os.getpid()} of" in listed[folder]["perhaps_in_use"]
    with pytest.raises(UserError, match=rf"process {os.getpid()} of .* trains {folder}"):
        clean(recipe)
    assert snapshot(recipe) == before
    lease.release()
    assert folder in clean(recipe)["removed"]
    assert not (Path(recipe).with_name("storage") / folder).exists()


def test_the_lease_of_a_process_that_has_died_does_not_keep_its_training(recipe):
    folder = start_training(recipe)
    done = subprocess.run([sys.executable, "-c", ""], check=True)
    assert done.returncode == 0
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    lease = Lease(open_store(str(Path(recipe).with_name("storage"))), f"{folder}/lease.json", "x")
    assert lease.acquire()
    record = json.loads(lease.store.read(lease.file)) | {"pid": process.pid}
    lease.store.write(lease.file, json.dumps(record).encode())
    assert folder in clean(recipe)["removed"]
