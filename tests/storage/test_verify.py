"""Damage of every kind is found, named, refused by readers and healed."""

import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pytest

from rayfuse.storage.dataset import DataSet
from rayfuse.storage.rejects import Reject
from rayfuse.storage.seal import ShardError, seal
from rayfuse.storage.todo import list_missing
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


def make_captured(corpus: DataSet, shards: int = NUM_SHARDS) -> DataSet:
    """A data set that was made from a corpus, shard by shard."""
    captured = DataSet(corpus.store, "captured", "a", "f00f", (corpus,))
    captured.claim({})
    for shard in range(shards):
        inputs = {"corpus": corpus.read_commit(shard).identity}
        table = make_table(shard + 1).drop_columns(["text"])
        captured.write_shard(shard, table, tokens=1, inputs=inputs)
    return captured


def test_rows_that_are_not_the_corpus_own_are_damage(data):
    captured = DataSet(data.store, "captured", "a", "f00f", (data,))
    captured.claim({})
    captured.write_shard(0, make_table(1), tokens=1)
    captured.write_shard(1, make_table(3), tokens=1)
    (damage,) = verify_data_set(captured).corrupt
    assert (damage.shard, damage.reason) == (1, "holds other rows than the corpus")


def write_other_text(corpus: DataSet, shard: int) -> None:
    """Lose a shard, and make it again from a document that has changed: same ids, other text."""
    corpus.drop_shards([shard])
    table = make_table(shard + 1)
    text = pa.array(["tent"] * (shard + 1))
    table = table.set_column(table.column_names.index("text"), "text", text)
    corpus.write_shard(shard, table, tokens=shard + 1)
    corpus.finish(NUM_SHARDS)


def test_a_repair_of_the_corpus_that_makes_other_text_makes_stale_what_was_made_from_it(data):
    captured = make_captured(data)
    captured.finish(NUM_SHARDS)
    assert captured.is_complete()
    write_other_text(data, 2)
    assert not captured.is_complete()
    (damage,) = verify_data_set(captured).corrupt
    assert (damage.shard, damage.file) == (2, f"{captured.folder}/{captured.commits()[2].file}")
    assert "is stale" in damage.reason
    notes: list[str] = []
    assert list_missing(captured, NUM_SHARDS, notes.append) == [2]
    assert "1 shards, the first is 2" in notes[0]


def test_a_repair_of_the_corpus_that_makes_the_same_text_makes_nothing_stale(data):
    captured = make_captured(data)
    captured.finish(NUM_SHARDS)
    path_of(data, 2).unlink()
    assert data.drop_missing_shards() == [2]
    data.write_shard(2, make_table(3), tokens=3)
    data.finish(NUM_SHARDS)
    assert captured.is_complete() and not verify_data_set(captured).corrupt


def test_an_incomplete_data_set_with_a_stale_shard_is_not_finished(data):
    captured = make_captured(data)
    write_other_text(data, 1)
    with pytest.raises(ShardError, match=r"1 shards, the first is 1, were made from other rows"):
        captured.finish(NUM_SHARDS)
    assert captured.list_committed() == {0, 2, 3}


def test_targets_share_what_was_captured_since_only_the_text_counts(data, tmp_path):
    other = DataSet(data.store, "corpus", "", "beef")
    other.claim({})
    table = make_table(1)
    ids = pa.array([[7, 8, 9]], type=table.schema.field("target_ids").type)
    table = table.set_column(table.column_names.index("target_ids"), "target_ids", ids)
    commit = other.write_shard(0, table, tokens=3)
    assert commit.identity == data.read_commit(0).identity
    assert commit.sha256 != data.read_commit(0).sha256


FOREIGN = (".nfs0000000001", ".DS_Store", "00000 (copy).json", "00000.json~", "0.json", "1.jsonl")


@pytest.mark.parametrize("folder", ["commits", "data", "rejects", "."])
def test_foreign_files_change_nothing_and_stay(folder, data):
    place = Path(data.store.root, data.folder, folder)
    place.mkdir(exist_ok=True)
    for name in (*FOREIGN, "00001-0123456789AB.parquet", "00001-0123.parquet"):
        (place / name).write_bytes(b"foreign")
    assert data.list_committed() == set(range(NUM_SHARDS))
    assert data.is_complete()
    assert data.count_rejects(data.list_committed(), NUM_SHARDS) == 0
    assert read_status(data, None).shards == NUM_SHARDS
    found = verify_data_set(data)
    assert (found.corrupt, found.orphans) == ([], [])
    path_of(data, 1).unlink()
    repair_data_set(data, verify_data_set(data), {})
    data.write_shard(1, make_table(2), tokens=2)
    data.finish(NUM_SHARDS)
    assert (place / ".DS_Store").read_bytes() == b"foreign"


NAMES = (
    "../../../victim/thesis.docx",
    "/victim/thesis.docx",
    "data/../../../victim/thesis.docx",
    "data/00002-0123456789ab.parquet",
    "data/1-0123456789ab.parquet",
    "commits/00000.json",
    "data/00001-0123456789ab.parquet/../../../../victim/thesis.docx",
)


@pytest.mark.parametrize("has_manifest", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_record_names_no_file_but_its_shards_own(name, has_manifest, data, tmp_path):
    victim = tmp_path.parent / f"{tmp_path.name}-victim"
    victim.mkdir()
    (victim / "thesis.docx").write_bytes(b"years of work")
    name = name.replace("victim", victim.name)
    commits = data.commits()
    record = asdict(commits[1]) | {"file": name}
    path = Path(data.store.root, data.folder, "commits/00001.json")
    path.write_bytes(seal(record))
    data.drop_manifest()
    if has_manifest:  # one that agrees
        commits[1] = replace(commits[1], file=name)
        data.write_manifest([commits[shard] for shard in range(NUM_SHARDS)], data.read_run())
    found = verify_data_set(data)
    assert 1 in {fault.shard for fault in found.corrupt}
    repair_data_set(data, found, {"recipe": {}})
    assert (victim / "thesis.docx").read_bytes() == b"years of work"
    assert data.list_committed() == {0, 2, 3}
    data.write_shard(1, make_table(2), tokens=2)
    data.finish(NUM_SHARDS)
    assert verify_data_set(data).corrupt == []


def test_a_manifest_names_no_file_but_records(data, tmp_path):
    manifest = data.read_manifest()
    assert manifest is not None
    record = data.read_run() | asdict(replace(manifest, records="../../../records"))
    Path(data.store.root, data.folder, "manifest.json").write_bytes(seal(record))
    with pytest.raises(ShardError, match=r"names the records '\.\./\.\./\.\./records'"):
        data.commits()


@pytest.mark.parametrize("change", [{"rows": 11}, {"num_shards": 3}, {"content_sha256": "0"}])
def test_a_manifest_with_other_totals_than_its_records_is_corrupt(change, data):
    manifest = data.read_manifest()
    assert manifest is not None
    record = data.read_run() | asdict(manifest) | change
    Path(data.store.root, data.folder, "manifest.json").write_bytes(seal(record))
    assert f"{data.folder}/manifest.json" in {f.file for f in verify_data_set(data).corrupt}


@pytest.mark.parametrize("fault", ["missing", "flipped"])
def test_a_file_of_rejects_that_is_missing_or_corrupt_is_found_and_written_again(fault, tmp_path):
    data = make_data(tmp_path)
    rejects = [Reject("a", "empty"), Reject("b", "empty")]
    data.write_shard(0, make_table(1), tokens=1, rejects=rejects)
    data.finish(1)
    path = tmp_path / data.folder / "rejects/00000.jsonl"
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b"empty", b"emptz", 1))
    with pytest.raises(ShardError, match=r"rejects/00000.jsonl.*verify --repair"):
        read_status(data, 1)
    found = verify_data_set(data)
    assert [fault.file for fault in found.corrupt] == [f"{data.folder}/rejects/00000.jsonl"]
    repair_data_set(data, found, {})
    data.write_shard(0, make_table(1), tokens=1, rejects=rejects)
    data.finish(1)
    assert not verify_data_set(data).corrupt
    assert read_status(data, 1).rejects == {"empty": 2}


def test_a_corrupt_log_of_a_capture_is_found_and_removed(data):
    path = Path(data.store.root, data.folder, "metrics.jsonl")
    path.write_bytes(seal({"time": 1.0}, indent=None) + b"\n" + b'{"time": 2.0, "tok')
    with pytest.raises(ShardError, match=r"metrics.jsonl is no record"):
        read_status(data, None)
    found = verify_data_set(data)
    assert [fault.file for fault in found.corrupt] == [f"{data.folder}/metrics.jsonl"]
    repair_data_set(data, found, {})
    assert not path.exists() and data.is_complete()


def test_status_counts_shards_rows_and_rejects_by_reason(data):
    assert read_status(data, None).is_complete
    data.drop_shards([2])
    rejects = [Reject("a", "empty"), Reject("b", "empty")]
    data.write_shard(2, make_table(3), tokens=3, rejects=rejects)
    status = read_status(data, 6)
    assert (status.shards, status.num_shards, status.rows) == (NUM_SHARDS, 6, 10)
    assert status.rejects == {"empty": 2}
    assert not status.is_complete
