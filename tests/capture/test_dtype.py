"""The recorded dtype of a capture: any damage is found, and repaired or captured again."""

import pytest

from rayfuse.capture.dtype import find_corrupt_dtype, repair_dtype, settle_dtype
from rayfuse.config.base import UserError
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.store import LocalStore
from tests.storage.test_dataset import make_table


@pytest.fixture
def captured(tmp_path) -> DataSet:
    data = DataSet(LocalStore(str(tmp_path)), "captured", "a", "f00d")
    data.claim({})
    data.write_shard(0, make_table(), tokens=1)
    return data


def write(captured: DataSet, content: bytes) -> None:
    captured.store.write(f"{captured.folder}/dtype", content)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_flipped_bit_of_the_record_is_found_and_repaired_without_a_new_capture(
    dtype, captured
):
    assert not list(find_corrupt_dtype(captured))
    for bit in range(8 * len(dtype)):
        flipped = bytearray(dtype.encode())
        flipped[bit // 8] ^= 1 << bit % 8
        write(captured, bytes(flipped))
        with pytest.raises(UserError, match="verify --repair"):
            settle_dtype(captured, "auto", on_gpu=True)
        ((name, _),) = find_corrupt_dtype(captured)
        assert name == f"{captured.folder}/dtype"
        repair_dtype(captured)
        assert settle_dtype(captured, "auto", on_gpu=dtype == "float32") == dtype
    assert captured.list_committed() == {0}


@pytest.mark.parametrize("content", [b"", b"\xff\xff", b"int8", b"x" * 100])
def test_a_lost_record_means_that_all_shards_are_captured_again(content, captured):
    write(captured, content)
    repair_dtype(captured)
    assert not captured.list_committed()
    assert settle_dtype(captured, "auto", on_gpu=False) == "float32"
