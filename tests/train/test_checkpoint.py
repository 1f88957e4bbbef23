"""Checkpoints: whole or not used, undamaged or not used, kept as long as they are worth it."""

import tempfile
from pathlib import Path

import pytest

from rayfuse.storage.store import LocalStore
from rayfuse.train.checkpoint import Checkpoints, Record, name_checkpoint


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
    checkpoints.begin(name)
    for rank in ranks:
        local = tempfile.TemporaryDirectory()
        Path(local.name, "ds").mkdir()
        Path(local.name, "ds", f"part_{rank}.pt").write_bytes(b"%d of %d" % (rank, step))
        checkpoints.upload(local, Record(name, step, 2, {}, bits), rank)
        checkpoints.wait()
        assert not Path(local.name).exists()
    return name


def test_a_checkpoint_comes_back_as_it_was(checkpoints, tmp_path):
    name = save(checkpoints, 5)
    ((found, records),) = checkpoints.list_whole().items()
    assert found == name
    assert checkpoints.download(records, tmp_path / "back")
    assert (tmp_path / "back/ds/part_0.pt").read_bytes() == b"0 of 5"
    assert (tmp_path / "back/ds/part_1.pt").read_bytes() == b"1 of 5"


def test_one_that_was_cut_off_is_not_used_and_is_known(checkpoints):
    whole, cut = save(checkpoints, 5), save(checkpoints, 10, ranks=(0,))
    assert list(checkpoints.list_whole()) == [whole]
    assert checkpoints.list_cut_off() == [cut]


def test_two_attempts_at_one_step_are_not_mixed(checkpoints):
    save(checkpoints, 5, ranks=(0,), attempt="a")
    save(checkpoints, 5, ranks=(1,), attempt="b")
    assert not checkpoints.list_whole()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_before_anything_is_loaded(damage, checkpoints, tmp_path):
    name = save(checkpoints, 5)
    path = tmp_path / "train/fused-x/checkpoints" / name / "ds/part_1.pt"
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(b"1 of 6" if damage == "flip" else b"1 of")
    (records,) = checkpoints.list_whole().values()
    assert not checkpoints.download(records, tmp_path / "back")


def test_the_newest_and_the_best_are_kept(checkpoints, tmp_path):
    bits = {1: 2.0, 2: 1.5, 3: 1.7, 4: 1.8, 5: 1.9}
    for step, each in bits.items():
        save(checkpoints, step, bits=each)
    cut = save(checkpoints, 3, ranks=(0,), attempt="cut")
    making = save(checkpoints, 6, ranks=(0,))
    checkpoints.retain(2)
    assert [name[5:13] for name in checkpoints.list_whole()] == ["00000002", "00000004", "00000005"]
    assert checkpoints.list_cut_off() == [making]
    folder = tmp_path / "train/fused-x/checkpoints"
    assert not list(folder.glob(f"{cut}/ds/*"))
    assert list(folder.glob(f"{making}/ds/*"))


def test_fault_14_a_full_disk_is_named_and_leaves_the_checkpoint_before(small_disk, tmp_path):
    checkpoints = Checkpoints(LocalStore(str(small_disk)), "train/fused-x")
    before = save(checkpoints, 5)
    local = tempfile.TemporaryDirectory()
    Path(local.name, "weights.pt").write_bytes(bytes(2**20))
    record = Record(name_checkpoint(10, "a"), 10, 1, {}, None)
    checkpoints.begin(record.name)
    checkpoints.upload(local, record, 0)
    with pytest.raises(OSError, match="No space left on device") as error:
        checkpoints.wait()
    assert str(small_disk) in str(error.value)
    assert list(checkpoints.list_whole()) == [before]
    later = Checkpoints(checkpoints.store, "train/fused-x")
    after = save(later, 15)
    assert list(later.list_whole()) == [before, after]
