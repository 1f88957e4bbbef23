"""Checkpoints: used only when complete and intact, and retained by age and validation."""

import hashlib
import pickle
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from rayfuse.storage.store import LocalStore
from rayfuse.train.checkpoint import CheckpointRecord, Checkpoints, name_checkpoint
from rayfuse.train.process_group import ProcessGroup
from rayfuse.train.resume import fetch_newest


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(LocalStore(str(tmp_path)), "train/fused-x")


def save(
    checkpoints: Checkpoints,
    step: int,
    *,
    ranks: tuple[int, ...] = (0, 1),
    bits: float | None = None,
    attempt: str = "a",
) -> str:
    name = name_checkpoint(step, attempt)
    checkpoints.mark_started(name)
    for rank in ranks:
        local = tempfile.TemporaryDirectory()
        Path(local.name, "ds").mkdir()
        Path(local.name, "ds", f"part_{rank}.pt").write_bytes(b"%d of %d" % (rank, step))
        checkpoints.upload(local, CheckpointRecord(name, step, 2, {}, bits), rank)
        checkpoints.wait()
        assert not Path(local.name).exists()
    return name


def test_a_checkpoint_comes_back_as_it_was(checkpoints, tmp_path):
    name = save(checkpoints, 5)
    ((found, records),) = checkpoints.list_complete().items()
    assert found == name
    assert checkpoints.download(records, tmp_path / "back")
    assert (tmp_path / "back/ds/part_0.pt").read_bytes() == b"0 of 5"
    assert (tmp_path / "back/ds/part_1.pt").read_bytes() == b"1 of 5"


def test_an_incomplete_checkpoint_is_not_used_and_is_listed(checkpoints):
    complete, incomplete = save(checkpoints, 5), save(checkpoints, 10, ranks=(0,))
    assert list(checkpoints.list_complete()) == [complete]
    assert checkpoints.list_incomplete() == [incomplete]


def test_two_attempts_at_one_step_are_not_mixed(checkpoints):
    save(checkpoints, 5, ranks=(0,), attempt="a")
    save(checkpoints, 5, ranks=(1,), attempt="b")
    assert not checkpoints.list_complete()


@pytest.mark.parametrize("fault", ["flip", "cut", "remove"])
def test_a_corrupt_file_is_found_before_anything_is_loaded(fault, checkpoints, tmp_path):
    name = save(checkpoints, 5)
    path = tmp_path / "train/fused-x/checkpoints" / name / "ds/part_1.pt"
    if fault == "remove":
        path.unlink()
    else:
        path.write_bytes(b"1 of 6" if fault == "flip" else b"1 of")
    (records,) = checkpoints.list_complete().values()
    assert not checkpoints.download(records, tmp_path / "back")


def test_the_newest_and_the_best_are_kept(checkpoints, tmp_path):
    bits = {1: 2.0, 2: 1.5, 3: 1.7, 4: 1.8, 5: 1.9}
    for step, value in bits.items():
        save(checkpoints, step, bits=value)
    cut = save(checkpoints, 3, ranks=(0,), attempt="cut")
    uploading = save(checkpoints, 6, ranks=(0,))
    checkpoints.retain(2)
    assert [name[5:13] for name in checkpoints.list_complete()] == [
        "00000002",
        "00000004",
        "00000005",
    ]
    assert checkpoints.list_incomplete() == [uploading]
    folder = tmp_path / "train/fused-x/checkpoints"
    assert not list(folder.glob(f"{cut}/ds/*"))
    assert list(folder.glob(f"{uploading}/ds/*"))


@dataclass(frozen=True)
class Bomb:
    """Writes a file as it is unpickled."""

    path: str

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("torn", [b"", b'{"name": "step_0000', b"[]", b"{}", b"\xff\x00", b"null"])
def test_a_torn_record_makes_its_checkpoint_incomplete(torn, checkpoints, tmp_path):
    before, name = save(checkpoints, 5), save(checkpoints, 10)
    (tmp_path / f"train/fused-x/checkpoints/records/{name}-1.json").write_bytes(torn)
    assert list(checkpoints.list_complete()) == [before]
    assert checkpoints.list_incomplete() == [name]


def test_foreign_files_among_the_records_are_neither_read_nor_removed(checkpoints, tmp_path):
    names = [save(checkpoints, step) for step in (1, 2, 3)]
    folder = tmp_path / "train/fused-x/checkpoints"
    foreign = [folder / "records" / name for name in (".DS_Store", "notes.json", "step_1-0.json")]
    foreign += [folder / "readme.txt", folder / names[2] / "ds" / "more.txt"]
    for path in foreign:
        path.write_bytes(b"not ours")
    assert list(checkpoints.list_complete()) == names
    assert not checkpoints.list_incomplete()
    checkpoints.retain(1)
    assert list(checkpoints.list_complete()) == names[2:]
    assert all(path.exists() for path in foreign)


def test_fault_29_a_record_names_no_file_outside_its_checkpoint(checkpoints, tmp_path):
    save(checkpoints, 5)
    (records,) = checkpoints.list_complete().values()
    (tmp_path / "train/fused-x/checkpoints/stolen").write_bytes(b"x")
    digest = hashlib.sha256(b"x").hexdigest()
    hostile = replace(records[0], files={"../stolen": digest})
    assert not checkpoints.download([hostile], tmp_path / "back/in")
    assert not (tmp_path / "back/stolen").exists()


def test_fault_25_a_pickle_in_place_of_a_checkpoints_file_is_never_read(
    process_group, checkpoints, tmp_path
):
    name = save(checkpoints, 5)
    group = ProcessGroup(rank=0, num_workers=1, local_rank=0, scratch=tmp_path / "scratch")
    group.reset_scratch()
    messages: list[str] = []
    marker = tmp_path / "marker"
    path = tmp_path / "train/fused-x/checkpoints" / name / "ds/part_1.pt"
    path.write_bytes(pickle.dumps(Bomb(str(marker))))
    with fetch_newest(checkpoints, group, messages.append) as found:
        assert found is None
    assert not any(group.scratch.iterdir())
    assert messages == ["the checkpoint of step 5 is corrupt and not used"]
    assert not marker.exists()
    pickle.loads(path.read_bytes())  # it would have gone off
    assert marker.exists()


def test_fault_14_a_full_disk_is_named_and_leaves_the_checkpoint_before(small_disk, tmp_path):
    checkpoints = Checkpoints(LocalStore(str(small_disk)), "train/fused-x")
    before = save(checkpoints, 5)
    local = tempfile.TemporaryDirectory()
    Path(local.name, "weights.pt").write_bytes(bytes(2**20))
    record = CheckpointRecord(name_checkpoint(10, "a"), 10, 1, {}, None)
    checkpoints.mark_started(record.name)
    checkpoints.upload(local, record, 0)
    with pytest.raises(OSError, match="No space left on device") as error:
        checkpoints.wait()
    assert str(small_disk) in str(error.value)
    assert list(checkpoints.list_complete()) == [before]
    later = Checkpoints(checkpoints.store, "train/fused-x")
    after = save(later, 15)
    assert list(later.list_complete()) == [before, after]
