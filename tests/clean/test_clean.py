"""`rayfuse clean` removes what no recipe uses, and nothing else."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from s3fs import S3FileSystem

from rayfuse import api
from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.clean import command
from rayfuse.config.base import UserError
from rayfuse.run.layout import Layout, plan_layout
from rayfuse.runtime.console import PlainConsole
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.items import list_stored, remove_item
from rayfuse.storage.lease import Lease
from rayfuse.storage.seal import ShardError, seal
from rayfuse.storage.store import LocalStore, Store, open_store
from tests.stored_run import store_rows, write_run
from tests.test_cli import rayfuse

OTHER = "align.method=exact"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Store the rows of a recipe, and what the same recipe aligns by another method."""
    folder = tmp_path_factory.mktemp("made")
    write_run(folder)
    store_rows(api.load_run_with(folder / "recipe.yaml", [OTHER]).recipe)
    return folder


@pytest.fixture
def recipe(made: Path, tmp_path: Path) -> str:
    """Copy the storage, and return a recipe of the copy."""
    shutil.copytree(made / "storage", tmp_path / "storage")
    values = yaml.safe_load((made / "recipe.yaml").read_text())
    values["storage"] = str(tmp_path / "storage")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def clean(*arguments: str, delete: bool = True, idle_hours: float = 1.0) -> dict[str, Any]:
    console = PlainConsole(None, quiet=True)
    return api.clean_runs(arguments, console, delete=delete, idle_hours=idle_hours)


def names_of(result: dict[str, Any]) -> list[str]:
    return sorted(item["name"] for item in result["items"])


def layout_of(*arguments: str) -> Layout:
    return plan_layout(api.load_run_with(arguments[0], arguments[1:]).recipe, ALIGN_FACTS)


def aligned_folders(*arguments: str) -> list[str]:
    return sorted(data.folder for data in layout_of(*arguments).aligned.values())


def snapshot(recipe: str) -> dict[str, bytes]:
    root = Path(recipe).with_name("storage")
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def start_capture(recipe: str) -> DataSet:
    """Write the first shard of a capture with another top_k."""
    data = layout_of(recipe, "capture.top_k=3").captured["neox"]
    done = layout_of(recipe).captured["neox"]
    data.claim({"recipe": {}})
    data.write_shard(0, done.read_shard(done.read_commit(0)), tokens=1)
    return data


def start_training(recipe: str) -> str:
    """Write the files that a training of another learning rate has, and return its folder."""
    layout = layout_of(recipe, "train.learning_rate=0.5")
    folder = layout.runs[0].folder
    layout.store.write(f"{folder}/checkpoints/records/step_00000001-a-0.json", b"{}")
    layout.store.write(f"{folder}/checkpoints/step_00000001-a/ds/x.pt", b"0" * 1000)
    steps = [{"seconds": 1800.0, "num_workers": 2}, {"seconds": 1800.0, "num_workers": 2}]
    lines = "".join(json.dumps(step) + "\n" for step in steps)
    layout.store.write(f"{folder}/metrics.jsonl", lines.encode())
    return folder


def test_only_what_no_given_recipe_names_is_listed_and_nothing_is_removed(recipe):
    before = snapshot(recipe)
    result = clean(recipe, delete=False)
    assert names_of(result) == aligned_folders(recipe, OTHER)
    assert clean(recipe, recipe, OTHER, delete=False)["items"] == []
    assert names_of(clean(recipe, OTHER, delete=False)) == aligned_folders(recipe)
    sizes = {name: len(content) for name, content in before.items()}
    for item in result["items"]:
        own = [size for name, size in sizes.items() if name.startswith(f"{item['name']}/")]
        assert item["bytes"] == sum(own) > 0
    assert snapshot(recipe) == before


def test_delete_removes_what_is_listed_and_changes_nothing_else(recipe):
    before = snapshot(recipe)
    unused = aligned_folders(recipe, OTHER)
    result = clean(recipe)
    assert result["removed"] == unused
    after = {n: c for n, c in before.items() if not n.startswith(tuple(f"{u}/" for u in unused))}
    assert snapshot(recipe) == after
    assert result["removed_bytes"] == sum(map(len, before.values())) - sum(map(len, after.values()))
    root = Path(recipe).with_name("storage")
    assert not any((root / folder).exists() for folder in unused)
    assert clean(recipe)["items"] == []
    assert all(data.is_complete() for data in layout_of(recipe).aligned.values())


class MortalStore(LocalStore):
    """Dies after some removals."""

    def __init__(self, root: str, removals: int) -> None:
        super().__init__(root)
        self.__dict__["left"] = removals

    def remove(self, name: str) -> None:
        if not self.__dict__["left"]:
            raise KeyboardInterrupt
        self.__dict__["left"] -= 1
        super().remove(name)


def test_a_removal_that_is_killed_anywhere_is_resumed_and_never_leaves_a_complete_data_set(
    made, tmp_path, recipe, monkeypatch
):
    monkeypatch.setattr("rayfuse.storage.items.NUM_READERS", 1)
    data = layout_of(recipe, OTHER).aligned["neox"]
    root, kills = tmp_path / "storage", 0
    num_files = sum(name.startswith(data.folder) for name in snapshot(recipe))
    for removals in range(1, num_files):
        shutil.rmtree(root)
        shutil.copytree(made / "storage", root)
        store = MortalStore(str(root), removals)
        (item,) = [i for i in list_stored(store, lambda _: False) if i.name == data.folder]
        with pytest.raises(KeyboardInterrupt):
            remove_item(store, item, lambda: None)
        assert data.read_manifest() is None
        (left,) = [i for i in list_stored(data.store, lambda _: False) if i.name == data.folder]
        assert not left.is_complete
        remove_item(data.store, left, lambda: None)
        assert not (root / data.folder).exists()
        kills += 1
    assert kills > 5


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


def test_checkpoints_of_a_training_that_a_recipe_names_are_kept(recipe):
    folder = start_training(recipe)
    result = clean(recipe, recipe, "train.learning_rate=0.5")
    assert folder not in result["removed"]
    assert any(name.startswith(f"{folder}/checkpoints/step") for name in snapshot(recipe))


def test_a_model_of_the_storage_that_a_recipe_names_as_its_source_is_kept(recipe, made):
    folder = start_training(recipe)
    root = Path(recipe).with_name("storage")
    shutil.copytree(made / "neox", root / folder / "model")
    values = yaml.safe_load(Path(recipe).read_text())
    values["sources"][0]["model"] = str(root / folder / "model")
    other = Path(recipe).with_name("other.yaml")
    other.write_text(yaml.safe_dump(values))
    assert folder not in clean(recipe, str(other), recipe, OTHER)["removed"]
    assert folder in clean(recipe)["removed"]


def test_what_holds_a_link_is_kept_and_what_the_link_names_is_not_touched(recipe, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("data")
    root = tmp_path / "storage"
    first, second = aligned_folders(recipe, OTHER)
    (root / first / "data" / "link").symlink_to(outside)
    shutil.move(root / second, tmp_path / "moved")
    (root / second).symlink_to(tmp_path / "moved")
    before = snapshot(recipe)
    result = clean(recipe)
    assert result["removed"] == []
    assert [item["kept"] for item in result["items"]] == [
        f"{first}/data/link is a link, which is not followed: remove it by hand",
        f"{second} is a link, which is not followed: remove it by hand",
    ]
    assert snapshot(recipe) == before
    assert (outside / "precious").read_text() == "data"
    assert (tmp_path / "moved" / "manifest.json").is_file()


def test_a_data_set_of_an_earlier_schema_version_stops_it(recipe):
    store = open_store(str(Path(recipe).with_name("storage")))
    run = {"fingerprint": "0123456789ab", "schema_version": 4}
    store.write("captured/old-0123456789ab/run.json", json.dumps(run).encode())
    before = snapshot(recipe)
    with pytest.raises(UserError, match=r"schema version 4.*run `rayfuse migrate"):
        clean(recipe)
    assert snapshot(recipe) == before


def test_files_that_no_stage_writes_are_never_listed(recipe):
    root = Path(recipe).with_name("storage")
    for name in ("captured/notes.txt", "captured/mine-0123456789ab/x", "docs/a-0123456789ab.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("mine")
    (root / "captured/empty").mkdir()
    assert names_of(clean(recipe)) == aligned_folders(recipe, OTHER)
    assert (root / "captured/mine-0123456789ab/x").read_text() == "mine"
    assert (root / "captured/empty").is_dir()


def test_costs_are_those_of_the_records_and_prices_and_unknown_without(recipe):
    data = start_capture(recipe)
    store, folder = data.store, start_training(recipe)
    settings = {"name": "neox", "model": "m", "accelerator_type": "L4", "gpus": 2}
    store.remove(f"{data.folder}/run.json")
    data.claim({"recipe": {"sources": [settings]}})
    data.drop_shards([0])
    done = layout_of(recipe).captured["neox"]
    stats = {"busy_seconds": 5400.0, "idle_seconds": 1800.0, "began": 0.0}
    data.write_shard(0, done.read_shard(done.read_commit(0)), tokens=1, stats=stats)
    store.write("evaluate/gone-0123456789ab.json", seal({"seconds": 36.0}))
    items = {item["name"]: item for item in clean(recipe, delete=False)["items"]}
    captured = items[data.folder]
    assert captured["worker_seconds"] == 7200
    assert captured["dollars"] == pytest.approx(2 * 2 * 0.8)  # hours, GPUs, an L4 on demand
    assert items[folder]["worker_seconds"] == 7200
    assert items[folder]["dollars"] is None  # nothing records on which GPUs
    assert items["evaluate/gone-0123456789ab"]["worker_seconds"] == 36
    for name in aligned_folders(recipe, OTHER):
        assert items[name]["worker_seconds"] is items[name]["dollars"] is None


@pytest.mark.parametrize("hours", [-1.0, float("nan")])
def test_an_impossible_idle_time_is_refused(recipe, hours):
    with pytest.raises(UserError, match="--idle-hours is"):
        clean(recipe, idle_hours=hours)


def test_recipes_with_two_storages_are_refused(recipe, made):
    with pytest.raises(UserError, match="the recipes have different storages"):
        clean(recipe, str(made / "recipe.yaml"))


def test_a_recipe_that_cannot_be_read_stops_the_command(recipe, tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("storage: [")
    before = snapshot(recipe)
    done = rayfuse("clean", recipe, str(broken), "--delete")
    assert done.returncode == 2
    assert "broken.yaml" in done.stderr
    assert snapshot(recipe) == before


def test_the_command_lists_and_removes_and_takes_overrides(recipe):
    done = rayfuse("clean", recipe)
    assert done.returncode == 0, done.stderr
    assert "nothing was removed" in done.stdout
    assert all(folder in done.stdout for folder in aligned_folders(recipe, OTHER))
    done = rayfuse("clean", recipe, OTHER, "--delete", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["removed"] == aligned_folders(recipe)
    done = rayfuse("clean", OTHER, recipe)
    assert done.returncode == 2
    assert "an override without a recipe before it" in done.stderr


def test_a_name_that_leads_out_of_the_storage_is_refused_before_anything_is_removed(recipe):
    data = layout_of(recipe, OTHER).aligned["neox"]
    (item,) = [i for i in list_stored(data.store, lambda _: False) if i.name == data.folder]
    bad = replace(item, files=item.files | {f"{item.name}/data/../../x": 0})
    before = snapshot(recipe)
    with pytest.raises(ShardError, match="leads out of the storage"):
        remove_item(data.store, bad, lambda: None)
    assert snapshot(recipe) == before


def make_folder_objects(root: str, *folders: str) -> None:
    """Make the empty objects by which a console shows folders."""
    filesystem = S3FileSystem(skip_instance_cache=True)
    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    for folder in folders:
        key = f"{prefix}/{folder}/"
        filesystem.call_s3("put_object", Bucket=bucket, Key=key, Body=b"")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_items_of_object_storage_are_listed_with_their_age_and_removed(s3_root, made):
    store: Store = open_store(s3_root)
    local = LocalStore(str(made / "storage"))
    kept, gone = sorted(local.folders("aligned"))[:2]
    for folder in (kept, gone):
        for name in local.walk(f"aligned/{folder}").sizes:
            store.write(f"aligned/{folder}/{name}", local.read(f"aligned/{folder}/{name}"))
    make_folder_objects(
        s3_root, f"aligned/{gone}", f"aligned/{gone}/data", f"train/fused-{'0' * 12}"
    )
    (item,) = list_stored(store, lambda name: name == f"aligned/{kept}")
    assert item.name == f"aligned/{gone}"
    assert item.files == {
        f"{item.name}/{name}": size for name, size in local.walk(item.name).sizes.items()
    }
    assert item.is_complete
    assert item.changed_at == pytest.approx(time.time(), abs=600)
    remove_item(store, item, lambda: None)
    assert store.sizes(f"aligned/{gone}") == store.walk(f"aligned/{gone}").sizes == {}
    assert not list(list_stored(store, lambda name: name == f"aligned/{kept}"))
    assert store.walk(f"aligned/{kept}").sizes == local.walk(f"aligned/{kept}").sizes
