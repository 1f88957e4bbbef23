"""Mutated files of a data set: readers refuse them, `verify` names them, a repair heals them."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfuse.config.base import UserError
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.rejects import Reject
from rayfuse.storage.seal import ShardError, seal
from rayfuse.storage.store import LocalStore
from rayfuse.storage.verify import METRICS_FILE, read_status, repair_data_set, verify_data_set
from tests.fuzz.mutations import edits, fuzz, mutate_bytes
from tests.storage.test_dataset import make_table

NUM_SHARDS = 3
RUN = {"recipe": {"storage": "here"}}
REJECTS = [Reject("d1", "empty"), Reject("d2", "not UTF-8")]
METRICS = seal({"source": "s", "time": 1.0, "tokens_per_second": 2.0}, indent=None) + b"\n"


def open_data(root: Path) -> DataSet:
    store = LocalStore(str(root))
    corpus = DataSet(store, "corpus", "", "c0ffee")
    return DataSet(store, "captured", "s", "beef", inputs=(corpus,))


def write_shards(data: DataSet, shards: set[int]) -> None:
    """Write shards as a stage does: each records the shard that it was made from."""
    for shard in sorted(shards):
        made_from = {each.stage: each.read_commit(shard).identity for each in data.inputs}
        rejects = REJECTS if shard == 1 else []
        data.write_shard(
            shard, make_table(shard + 1), tokens=shard, rejects=rejects, inputs=made_from
        )


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A complete data set with its input, rejects and the log of its capture."""
    root = tmp_path_factory.mktemp("original")
    for data in list_sets(root):
        data.claim(RUN)
        write_shards(data, set(range(NUM_SHARDS)))
        data.finish(NUM_SHARDS)
    captured = open_data(root)
    captured.store.write(f"{captured.folder}/{METRICS_FILE}", METRICS * 2)
    return root


def read_all(data: DataSet) -> Iterator[tuple[str, object]]:
    """Read all that a stage or a command reads of a data set; an error ends it."""
    yield "run", data.read_run()
    commits = data.commits()
    for shard, commit in commits.items():
        yield f"commit {shard}", data.read_commit(shard).identity
        yield f"shard {shard}", data.read_shard(commit).to_pylist()
        yield f"rejects {shard}", data.read_rejects(commit)
    yield "manifest", data.read_identities()
    yield "complete", data.is_complete()
    yield "status", read_status(data, NUM_SHARDS).tokens


def list_sets(root: Path) -> list[DataSet]:
    captured = open_data(root)
    return [*captured.inputs, captured]


def check_mutated_file(root: Path, file: Path, wanted: list[dict[str, object]]) -> None:
    """Read, verify, repair and complete data sets, one of whose files is not what was written.

    Args:
        root: The store.
        file: The mutated file.
        wanted: What is read of each data set if nothing is mutated.
    """
    sets = list_sets(root)
    for data, expected in zip(sets, wanted, strict=True):
        try:
            for name, value in read_all(data):
                # An input that is not what it was makes the shards incomplete, before it is read.
                assert value == expected[name] or (name == "complete" and value is False)
        except (ShardError, UserError) as error:
            assert str(error).strip()
    for data in sets:
        found = verify_data_set(data)
        is_named = any(file == Path(root, fault.file) for fault in found.corrupt)
        is_records = file.name.startswith("records-")  # named by the manifest that lists it
        if file.is_relative_to(root / data.folder) and file.name != METRICS_FILE:
            assert is_named or (is_records and found.corrupt), found
        repair_data_set(data, found, RUN)
        write_shards(data, set(range(NUM_SHARDS)) - data.list_committed())
        data.finish(NUM_SHARDS)
    for data, expected in zip(sets, wanted, strict=True):
        assert dict(read_all(data)) == expected
        assert not verify_data_set(data).corrupt


def test_a_data_set_with_a_mutated_file(original, tmp_path):
    files = sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file())
    assert len(files) == 21
    wanted = [dict(read_all(data)) for data in list_sets(original)]

    @fuzz(80)
    @given(st.sampled_from(files), edits)
    def check(file: Path, drawn):
        content = (original / file).read_bytes()
        mutated = mutate_bytes(content, drawn)
        if mutated == content:
            return
        root = tmp_path / "store"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(original, root)
        (root / file).write_bytes(mutated)
        check_mutated_file(root, root / file, wanted)

    check()
