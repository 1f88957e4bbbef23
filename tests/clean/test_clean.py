"""`rayfuse clean` removes what no recipe uses, and nothing else."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from s3fs import S3FileSystem

from rayfuse.config.base import UserError
from rayfuse.storage.items import list_stored, remove_item
from rayfuse.storage.seal import ShardError, seal
from rayfuse.storage.store import LocalStore, Store, open_store
from tests.clean.storages import (
    OTHER,
    aligned_folders,
    clean,
    layout_of,
    names_of,
    snapshot,
    start_capture,
    start_training,
)
from tests.test_cli import rayfuse


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


def test_a_corrupt_record_that_decides_which_folders_are_used_ends_it_before_any_removal(recipe):
    folder = layout_of(recipe).aligned["neox"].folder
    (record,) = Path(recipe).with_name("storage").glob(f"{folder}/records-*.parquet")
    record.write_bytes(record.read_bytes()[:-1])
    before = snapshot(recipe)
    with pytest.raises(
        ShardError, match=rf"{record.name} is not .*; run `rayfuse verify --repair`"
    ):
        clean(recipe)
    assert snapshot(recipe) == before
