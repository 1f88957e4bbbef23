"""Damage of every kind is found, named, refused by readers and healed."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rayfuse.storage.dataset import DataSet
from rayfuse.storage.manifest import ShardError
from rayfuse.storage.store import LocalStore
from rayfuse.storage.verify import read_status, repair_data_set, verify_data_set
from tests.storage.test_dataset import WatchedStore, make_data, make_table

NUM_SHARDS = 4


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    data = make_data(tmp_path)
    for shard in range(NUM_SHARDS):
        data.write_shard(shard, make_table(shard + 1), tokens=shard + 1)
    data.finish(NUM_SHARDS)
    return data


def path_of(data: DataSet, shard: int) -> Path:
    return Path(data.store.root, data.folder, data.read_commit(shard).file)


def flip_a_bit(data: DataSet) -> None:
    content = bytearray(path_of(data, 1).read_bytes())
    content[len(content) // 2] ^= 1
    path_of(data, 1).write_bytes(content)


def truncate(data: DataSet) -> None:
    os.truncate(path_of(data, 1), 100)


def delete(data: DataSet) -> None:
    path_of(data, 1).unlink()


def swap_files(data: DataSet) -> None:
    first, second = path_of(data, 1), path_of(data, 2)
    content = first.read_bytes()
    shutil.copy(second, first)
    second.write_bytes(content)


def swap_records(data: DataSet) -> None:
    commits = Path(data.store.root, data.folder, "commits")
    content = (commits / "00001.json").read_bytes()
    shutil.copy(commits / "00002.json", commits / "00001.json")
    (commits / "00002.json").write_bytes(content)


def put_another_models_shard(data: DataSet) -> None:
    """File and record both: only what the file says of itself tells."""
    other = DataSet(data.store, "captured", "other", "beef")
    commit = other.write_shard(1, make_table(2), tokens=2)
    folder = Path(data.store.root, data.folder)
    shutil.copy(Path(data.store.root, other.folder, commit.file), folder / commit.file)
    shutil.copy(
        Path(data.store.root, other.folder, "commits/00001.json"), folder / "commits/00001.json"
    )
    (folder / "manifest.json").unlink()


def cut_a_record(data: DataSet) -> None:
    os.truncate(Path(data.store.root, data.folder, "commits/00001.json"), 10)


def lose_a_record(data: DataSet) -> None:
    Path(data.store.root, data.folder, "commits/00001.json").unlink()


def cut_the_manifest(data: DataSet) -> None:
    os.truncate(Path(data.store.root, data.folder, "manifest.json"), 10)


def flip_the_records(data: DataSet) -> None:
    (path,) = Path(data.store.root, data.folder).glob("records-*.parquet")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    flip_a_bit: {1},
    truncate: {1},
    delete: {1},
    swap_files: {1, 2},
    swap_records: {1, 2},
    put_another_models_shard: {1},
    cut_a_record: {1},
    lose_a_record: {1},
    cut_the_manifest: {None},
    flip_the_records: {None},
}


def test_a_sound_data_set_has_no_damage(data):
    found = verify_data_set(data)
    assert (found.shards_checked, found.corrupt, found.orphans) == (NUM_SHARDS, [], [])


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_fault_12_damage_is_named_and_healed_and_nothing_else_is_touched(damage, data):
    damage(data)
    found = verify_data_set(data)
    assert {each.shard for each in found.corrupt} == DAMAGES[damage]
    assert all(each.file.startswith(data.folder) and each.reason for each in found.corrupt)
    kept = {s: path_of(data, s).read_bytes() for s in range(NUM_SHARDS) if s not in DAMAGES[damage]}
    repair_data_set(data, found, {"recipe": {}})
    assert not data.is_complete()
    for shard in set(range(NUM_SHARDS)) - data.list_committed():
        assert shard in DAMAGES[damage]
        data.write_shard(shard, make_table(shard + 1), tokens=shard + 1)
    data.finish(NUM_SHARDS)
    assert data.is_complete()
    assert not verify_data_set(data).corrupt
    for shard, commit in data.commits().items():
        assert data.read_shard(commit).equals(make_table(shard + 1))
    assert all(path_of(data, shard).read_bytes() == content for shard, content in kept.items())


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_fault_12_readers_never_give_out_what_is_damaged(damage, data):
    tables = {shard: make_table(shard + 1) for shard in range(NUM_SHARDS)}
    damage(data)
    try:
        commits = data.commits()
    except ShardError as error:
        assert "verify --repair" in str(error)
        return
    for shard, commit in commits.items():
        try:
            assert data.read_shard(commit).equals(tables[shard])
        except ShardError as error:
            assert data.folder in str(error) and "verify --repair" in str(error)
            assert shard in DAMAGES[damage]


def test_fault_10_leftovers_of_lost_attempts_are_found_and_those_in_flight_are_not(data):
    folder = Path(data.store.root, data.folder, "data")
    (folder / "00001-0123456789ab.parquet").write_bytes(b"half a shard")
    (folder / "00009-0123456789ab.parquet").write_bytes(b"a shard that may yet be committed")
    found = verify_data_set(data)
    assert not found.corrupt
    assert found.orphans == [f"{data.folder}/data/00001-0123456789ab.parquet"]
    repair_data_set(data, found, {})
    assert not (folder / "00001-0123456789ab.parquet").exists()
    assert (folder / "00009-0123456789ab.parquet").exists()
    assert data.is_complete()


def test_verifying_reads_each_record_once_and_lists_each_folder_once(data):
    watched = replace(data, store=WatchedStore(data.store.root))
    verify_data_set(watched)
    for folder, times in (("commits", NUM_SHARDS + 1), ("data", NUM_SHARDS + 1)):
        asked = [name for name in watched.store.asked if f"/{folder}/" in name]
        assert len(asked) == len(set(asked)) == times


def test_rows_that_are_not_the_corpus_own_are_damage(data, tmp_path):
    captured = DataSet(LocalStore(str(tmp_path)), "captured", "a", "f00f")
    captured.claim({})
    captured.write_shard(0, make_table(1), tokens=1)
    captured.write_shard(1, make_table(3), tokens=1)
    (damage,) = verify_data_set(captured, data).corrupt
    assert (damage.shard, damage.reason) == (1, "holds other rows than the corpus")


def test_status_counts_shards_rows_and_rejects_by_reason(data):
    rejects = Path(data.store.root, data.folder, "rejects")
    assert read_status(data, None).is_complete
    commit = json.loads(Path(data.store.root, data.folder, "commits/00002.json").read_text())
    rejects.mkdir()
    lines = [{"name": "a", "reason": "empty"}, {"name": "b", "reason": "empty"}]
    (rejects / "00002.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path(data.store.root, data.folder, "commits/00002.json").write_text(
        json.dumps(commit | {"rejects": 2})
    )
    data.drop_manifest()
    status = read_status(data, 6)
    assert (status.shards, status.num_shards, status.rows) == (NUM_SHARDS, 6, 10)
    assert status.rejects == {"empty": 2}
    assert not status.is_complete
