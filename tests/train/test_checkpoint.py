"""Checkpoints: used only when complete and intact, and retained by age and validation."""

import hashlib
import io
import pickle
import tempfile
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch

from rayfuse.config.base import UserError
from rayfuse.storage.seal import seal
from rayfuse.storage.store import LocalStore
from rayfuse.train.checkpoint import CheckpointRecord, Checkpoints, name_checkpoint
from rayfuse.train.pickle_guard import check_pickle
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
    inputs: dict[str, str] | None = None,
) -> str:
    name = name_checkpoint(step, attempt)
    checkpoints.mark_started(name)
    for rank in ranks:
        local = tempfile.TemporaryDirectory()
        Path(local.name, "ds").mkdir()
        Path(local.name, "ds", f"part_{rank}.pt").write_bytes(b"%d of %d" % (rank, step))
        checkpoints.upload(local, CheckpointRecord(name, step, 2, rank, {}, bits, inputs or {}))
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


def test_the_best_step_of_this_run_is_retained_beside_a_better_record(checkpoints):
    # The record of step 3 is better, but its files may be corrupt, so that the run resumed from 2.
    for step, value in {1: 2.0, 2: 1.0, 3: 0.5, 4: 1.5, 5: 1.5, 6: 1.5}.items():
        save(checkpoints, step, bits=value)
    checkpoints.retain(2, best_step=2)
    assert [int(name[5:13]) for name in checkpoints.list_complete()] == [2, 3, 5, 6]


@dataclass(frozen=True)
class Bomb:
    """Writes a file as it is unpickled."""

    path: str

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize(
    "torn", [b"[" * 100_000, b"", b'{"name": "step_0000', b"[]", b"{}", b"\xff\x00", b"null"]
)
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
    assert messages == ["the checkpoint of step 5 is not used: it is corrupt"]
    assert not marker.exists()
    pickle.loads(path.read_bytes())  # it would have gone off
    assert marker.exists()


def test_fault_14_a_full_disk_is_named_and_leaves_the_checkpoint_before(small_disk, tmp_path):
    checkpoints = Checkpoints(LocalStore(str(small_disk)), "train/fused-x")
    before = save(checkpoints, 5)
    local = tempfile.TemporaryDirectory()
    Path(local.name, "weights.pt").write_bytes(bytes(2**20))
    record = CheckpointRecord(name_checkpoint(10, "a"), 10, 1, 0, {}, None, {})
    checkpoints.mark_started(record.name)
    checkpoints.upload(local, record)
    with pytest.raises(OSError, match="No space left on device") as error:
        checkpoints.wait()
    assert str(small_disk) in str(error.value)
    assert list(checkpoints.list_complete()) == [before]
    later = Checkpoints(checkpoints.store, "train/fused-x")
    after = save(later, 15)
    assert list(later.list_complete()) == [before, after]


HOSTILE = {
    "the record of the other worker": asdict,
    "files that are a list": lambda record: asdict(record) | {"rank": 1, "files": ["a"]},
    "a long name": lambda record: (
        asdict(record) | {"rank": 1, "files": {f"ds/{'a' * 300}.pt": "0" * 64}}
    ),
    "a name outside": lambda record: asdict(record) | {"rank": 1, "files": {"ds/../../x.pt": "0"}},
    "an absolute name": lambda record: asdict(record) | {"rank": 1, "files": {"/etc/passwd": "0"}},
    "a rank that is text": lambda record: asdict(record) | {"rank": "1"},
    "a key too many": lambda record: asdict(record) | {"rank": 1, "more": 1},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_record_makes_its_checkpoint_incomplete(kind, checkpoints, tmp_path):
    name = save(checkpoints, 5)
    (records,) = checkpoints.list_complete().values()
    path = tmp_path / f"train/fused-x/checkpoints/records/{name}-1.json"
    path.write_bytes(seal(HOSTILE[kind](records[0])))
    assert not checkpoints.list_complete()
    assert checkpoints.list_incomplete() == [name]


def test_checkpoints_of_other_training_data_are_deleted_and_others_kept(checkpoints):
    old = save(checkpoints, 20, inputs={"corpus": "a"})
    new = save(checkpoints, 5, inputs={"corpus": "b"}, attempt="b")
    unknown = save(checkpoints, 6, attempt="c")
    assert checkpoints.remove_stale({"corpus": "b"}) == 1
    assert list(checkpoints.list_complete()) == [new, unknown]
    assert not checkpoints.store.sizes(f"{checkpoints.folder}/{old}/ds")


def put_file(checkpoints: Checkpoints, name: str, rank: int, content: bytes) -> None:
    """Replace a worker's file and its hash in the record beside it, as who writes the store can."""
    file = f"ds/part_{rank}.pt"
    checkpoints.store.write(f"{checkpoints.folder}/{name}/{file}", content)
    record = checkpoints.list_complete()[name][rank]
    record = replace(record, files={file: hashlib.sha256(content).hexdigest()})
    checkpoints.store.write(
        f"{checkpoints.folder}/records/{name}-{rank}.json", seal(asdict(record))
    )


@pytest.mark.parametrize("has_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_fault_25_a_pickle_with_an_agreeing_record_runs_no_code(
    has_zip, protocol, process_group, checkpoints, tmp_path
):
    name, before = save(checkpoints, 5), save(checkpoints, 3)
    for saved in (name, before):
        for rank in (0, 1):
            content = io.BytesIO()
            torch.save({"weight": torch.ones(3)}, content)
            put_file(checkpoints, saved, rank, content.getvalue())
    marker, content = tmp_path / "marker", io.BytesIO()
    torch.save(
        {"a": Bomb(str(marker))},
        content,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=has_zip,
    )
    put_file(checkpoints, name, 1, content.getvalue())
    group = ProcessGroup(rank=0, num_workers=1, local_rank=0, scratch=tmp_path / "scratch")
    group.reset_scratch()
    messages: list[str] = []
    with fetch_newest(checkpoints, group, messages.append) as found:
        assert found is not None and found.record.name == before
    assert "step 5 is not used: part_1.pt is no checkpoint of this package" in messages[0]
    assert not marker.exists()
    content.seek(0)
    torch.load(content, weights_only=False)
    assert marker.exists(), "it would have run"


def test_what_a_pickle_does_to_a_class_is_refused(tmp_path):
    """BUILD with a class on the stack would set attributes of it: no global is named but ours."""
    path = tmp_path / "a.pt"
    torch.save({}, path)
    program = (
        b"\x80\x02cdeepspeed.runtime.fp16.loss_scaler\nLossScaler\n}X\x01\x00\x00\x00aK\x01sb."
    )
    with zipfile.ZipFile(path) as archive:
        entries = {info: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for info, content in entries.items():
            archive.writestr(info, program if info.filename.endswith("data.pkl") else content)
    with pytest.raises(UserError, match=r"a\.pt is no checkpoint of this package"):
        check_pickle(path)
