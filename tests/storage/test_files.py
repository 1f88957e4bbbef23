"""Results with a record of their files: a record never names a file outside its folder."""

import pytest

from rayfuse.storage.files import (
    download_files,
    find_corrupt,
    hash_bytes,
    read_record,
    write_record,
)
from rayfuse.storage.seal import ShardError
from rayfuse.storage.store import LocalStore

RECORD = "train/fused-x/done.json"


@pytest.mark.parametrize("name", ["model/../../x", "/etc/passwd", "model//x", "..", "model/a\0b"])
def test_a_record_that_names_a_file_outside_is_corrupt_itself(name, tmp_path):
    """So that a repair removes the record, and never what it names."""
    store = LocalStore(str(tmp_path / "storage"))
    victim = tmp_path / "x"
    victim.write_text("kept")
    write_record(store, RECORD, {"inputs": {}}, {name: hash_bytes(b"other")})
    with pytest.raises(ShardError, match=r"done.json is corrupt: the name .* leads out"):
        read_record(store, RECORD)
    ((file, reason),) = find_corrupt(store, RECORD)
    assert file == RECORD
    assert "leads out" in reason
    with pytest.raises(ShardError, match="leads out"):
        download_files(store, RECORD, "", tmp_path)
    assert victim.read_text() == "kept"
