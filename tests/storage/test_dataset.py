import json
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayfuse.run.fingerprint import fingerprint_of
from rayfuse.schema import CORPUS
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.parquet import encode_table
from rayfuse.storage.rejects import Reject
from rayfuse.storage.seal import ShardError
from rayfuse.storage.store import LocalStore, Store, check_store, open_store


def make_data_in(store: Store) -> DataSet:
    data = DataSet(store, "corpus", "", "f00d")
    data.claim({"recipe": {}})
    return data


def make_data(folder: Path) -> DataSet:
    return make_data_in(LocalStore(str(folder)))


def make_table(rows: int = 3) -> pa.Table:
    return pa.Table.from_pydict(
        {
            "row_id": [f"d#{i}" for i in range(rows)],
            "doc_id": ["d"] * rows,
            "domain": [""] * rows,
            "text": ["text"] * rows,
            "num_bytes": [4] * rows,
            "ends_document": [False] * rows,
            "target_ids": [np.arange(i + 100) for i in range(rows)],
        },
        schema=CORPUS,
    )


def test_a_shard_reads_back_as_it_was_written(tmp_path):
    data = make_data(tmp_path)
    commit = data.write_shard(0, make_table(), tokens=9, rejects=[Reject("x", "empty")])
    assert data.read_shard(commit).equals(make_table())
    assert data.commits() == {0: commit}
    assert (commit.rows, commit.tokens, commit.rejects) == (3, 9, 1)
    lines = (tmp_path / data.folder / "rejects/00000.jsonl").read_text()
    assert json.loads(lines) == {"name": "x", "reason": "empty"}


def test_the_first_commit_wins_and_the_loser_leaves_nothing(tmp_path):
    data = make_data(tmp_path)
    first = data.write_shard(0, make_table(3), tokens=1)
    second = data.write_shard(0, make_table(4), tokens=2)
    assert second == first
    assert len(list((tmp_path / data.folder / "data").iterdir())) == 1


def test_creating_a_file_again_with_the_same_bytes_is_known_as_ours(tmp_path):
    """As a client does by itself when the answer to its first try is lost."""
    store = LocalStore(str(tmp_path))
    assert store.create("commits/0.json", b"attempt a")
    assert store.create("commits/0.json", b"attempt a")
    assert not store.create("commits/0.json", b"attempt b")


def test_a_shard_of_another_data_set_or_another_number_is_refused(tmp_path):
    data = make_data(tmp_path)
    first, second = (data.write_shard(shard, make_table(), tokens=1) for shard in (0, 1))
    other = DataSet(data.store, "corpus", "", "beef").write_shard(0, make_table(), tokens=1)
    os.replace(tmp_path / "corpus/beef" / other.file, tmp_path / data.folder / first.file)
    with pytest.raises(ShardError, match="is shard 0 of the data set beef, not shard 0 of f00d"):
        data.read_shard(replace(other, file=first.file))
    with pytest.raises(ShardError, match="is not what was committed"):
        data.read_shard(first)
    swapped = replace(second, shard=0)
    with pytest.raises(ShardError, match="is shard 1 of the data set f00d, not shard 0"):
        data.read_shard(swapped)


def test_fault_12_a_flipped_bit_is_found_wherever_it_is(tmp_path):
    data = make_data(tmp_path)
    commit = data.write_shard(0, make_table(), tokens=1)
    path = tmp_path / data.folder / commit.file
    sound = path.read_bytes()
    choose = random.Random(0)
    for offset in choose.choices(range(len(sound)), k=200):
        content = bytearray(sound)
        content[offset] ^= 1 << choose.randrange(8)
        path.write_bytes(content)
        with pytest.raises(ShardError, match="is not what was committed"):
            data.read_shard(commit)


def test_a_shard_that_is_gone_is_named(tmp_path):
    data = make_data(tmp_path)
    commit = data.write_shard(0, make_table(), tokens=1)
    os.remove(tmp_path / data.folder / commit.file)
    with pytest.raises(ShardError, match=f"{commit.file} is missing"):
        data.read_shard(commit)


def test_a_data_set_is_whole_once_every_shard_is_there_and_not_after_one_is_lost(tmp_path):
    data = make_data(tmp_path)
    commits = [data.write_shard(shard, make_table(), tokens=1) for shard in range(3)]
    assert not data.is_complete()
    with pytest.raises(ShardError, match="2 shards missing, first 3"):
        data.finish(5)
    data.finish(3)
    assert data.is_complete()
    assert list(data.commits()) == [0, 1, 2]
    os.remove(tmp_path / data.folder / commits[1].file)
    assert not data.is_complete()
    assert data.drop_missing_shards() == [1]
    assert list(data.commits()) == [0, 2]
    data.write_shard(1, make_table(), tokens=1)
    data.finish(3)
    assert data.is_complete()


class WatchedStore(LocalStore):
    """A folder that knows what it was asked."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        object.__setattr__(self, "asked", [])

    def read(self, name: str) -> bytes:
        self.asked.append(name)
        return super().read(name)

    def sizes(self, folder: str, prefix: str = "") -> dict[str, int]:
        self.asked.append(f"{folder}/{prefix}*")
        return super().sizes(folder, prefix)


class PrefixStore(WatchedStore):
    """The same, said to list a part at the cost of a part."""

    lists_by_prefix = True


@pytest.mark.parametrize("kind", [WatchedStore, PrefixStore])
def test_a_folder_of_many_shards_is_listed_once_or_by_first_digits_where_that_costs_less(
    kind, tmp_path
):
    data = make_data_in(kind(str(tmp_path)))
    shards = [0, 99_999, 100_000, 123_456]
    for shard in shards:
        data.write_shard(shard, make_table(), tokens=1, rejects=[Reject("x", "y")] * (shard % 7))
    data.store.asked.clear()
    num_shards = 200_000
    assert data.list_committed(num_shards) == set(shards)
    assert data.drop_missing_shards(num_shards) == []
    listings = len([name for name in data.store.asked if name.endswith("*")])
    assert listings == (300 if data.store.lists_by_prefix else 3)
    data.store.asked.clear()
    assert data.count_rejects(shards, num_shards) == sum(shard % 7 for shard in shards)
    read = [name for name in data.store.asked if not name.endswith("*")]
    assert len(read) == sum(shard % 7 > 0 for shard in shards)


def test_a_folder_of_another_fingerprint_is_refused(tmp_path):
    data = make_data(tmp_path)
    other = DataSet(data.store, "corpus", "", "beef")
    store = data.store
    store.write(f"{other.folder}/run.json", store.read(f"{data.folder}/run.json"))
    with pytest.raises(ValueError, match="fingerprint f00d, not beef"):
        other.claim({})


def test_lists_are_split_into_byte_planes_without_a_dictionary():
    metadata = pq.ParquetFile(pa.BufferReader(encode_table(make_table(), "f", 0))).metadata
    column = next(
        metadata.row_group(0).column(i)
        for i in range(metadata.num_columns)
        if metadata.row_group(0).column(i).path_in_schema == "target_ids.list.element"
    )
    assert "BYTE_STREAM_SPLIT" in column.encodings
    assert "RLE_DICTIONARY" not in column.encodings
    assert column.compression == "ZSTD"


def test_two_writes_of_one_table_are_the_same_bytes():
    assert encode_table(make_table(), "f", 0) == encode_table(make_table(), "f", 0)


def test_a_fingerprint_changes_with_every_part():
    base = fingerprint_of(a=1, b="x")
    assert base == fingerprint_of(b="x", a=1)
    assert len({base, fingerprint_of(a=2, b="x"), fingerprint_of(a=1), fingerprint_of(a="1")}) == 4


def test_a_storage_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"storage is .*file/run.*cannot be written"):
        check_store(open_store(str(tmp_path / "file" / "run")))


def test_an_object_store_keeps_what_it_is_asked_to_create_only_once():
    store = open_store("memory://rayfuse-test")
    check_store(store)
    assert store.create("a/b.json", b"1")
    assert not store.create("a/b.json", b"2")
    assert store.read("a/b.json") == b"1"
    store.write("a/c", b"333")
    assert store.sizes("a") == {"b.json": 1, "c": 3}
    store.remove("a/c")
    store.remove("a/c")
    assert store.sizes("nowhere") == {}
    with pytest.raises(FileNotFoundError):
        store.read("a/c")
