"""Records with a checksum: every changed bit is found."""

import json

import pytest

from rayfuse.storage.seal import SEAL, ShardError, seal, unseal

RECORD = {"name": "é\n", "values": [1, 2.5, 1e-9, None, True], "nested": {"a": {}}, "nan": "nan"}


@pytest.mark.parametrize("indent", [1, None])
def test_a_record_comes_back_as_it_was(indent):
    assert unseal(seal(RECORD, indent), "x.json", indent) == RECORD


@pytest.mark.parametrize("indent", [1, None])
def test_every_flipped_bit_of_a_record_is_found(indent):
    data = seal(RECORD, indent)
    for position in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(ShardError, match=r"x\.json"):
            unseal(bytes(flipped), "x.json", indent)


FAULTS = (
    b"",
    b"{}",
    b"[]",
    b"null",
    b"1",
    b"\xff",
    b"[" * 100_000,
    b'{"record_sha256": 1}',
    b'{"a": 1e999, "record_sha256": ""}',
    json.dumps(RECORD).encode(),
)


@pytest.mark.parametrize("data", FAULTS, ids=lambda data: repr(data[:20]))
def test_what_is_no_sealed_record_is_refused_by_name(data):
    with pytest.raises(ShardError, match=r"x.json is .*verify --repair"):
        unseal(data, "x.json")


def test_a_record_with_other_spelling_is_refused():
    data = seal(RECORD)
    assert SEAL.encode() in data
    for other in (data + b"\n", data.replace(b": ", b":", 1), data.replace(b"2.5", b"2.50")):
        with pytest.raises(ShardError, match="its checksum differs"):
            unseal(other, "x.json")
