"""Files that unpack into more than there is: rejected by name, and memory stays.

The number is that of the fault that the project's reliability list has.
"""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from rayfuse.config.base import UserError
from rayfuse.corpus.parquet_guard import find_largest_page, list_chunks
from rayfuse.corpus.shards import has_one_shard
from rayfuse.storage.parquet import read_footer
from tests.corpus.files import (
    BOUND_BYTES,
    CANARY,
    GOOD,
    MAX_BYTES,
    batch_all,
    check_rejects,
    good_lines,
    list_files,
    read_all,
    write_lines,
)

PROGRAM = r"""
import json, re, sys
from rayfuse.corpus.documents import read_documents
from rayfuse.config.corpus import DocumentsSettings
from rayfuse.run.inputs import list_inputs

def peak():
    # Not ru_maxrss, which a process takes over from the one that started it.
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])

(file,) = list_inputs(DocumentsSettings(path=sys.argv[1]), "documents").files
before = peak()
found = [[d.doc_id, d.text[:80], d.fault] for d in read_documents(file, int(sys.argv[2]))]
print(json.dumps({"documents": found, "growth": peak() - before}))
"""


def read_apart(path: Path) -> list[tuple[str, str, str | None]]:
    """Read a file in a process of its own, and check that it stayed small."""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is measured where Linux tells it")
    command = [sys.executable, "-c", PROGRAM, str(path), str(MAX_BYTES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    result = json.loads(done.stdout)
    print(f"{path.name}: {result['growth'] / 2**20:.0f} MiB")
    assert result["growth"] < BOUND_BYTES
    return [tuple(each) for each in result["documents"]]


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": lambda data: gzip.compress(data, 6),
    ".zst": zstandard.compress,
}
BOMBS = {
    "a text": (b'{"text": "', b"a", b'"}'),
    "escapes": (b'{"text": "', b"\\u0061", b'"}'),
    "lists": (b'{"text": [', b"[],", b"[]]}"),
    "blanks": (b"", b" ", b""),
}


@pytest.mark.parametrize(
    ("name", "suffix"), [("a text", ".gz"), *((name, ".zst") for name in BOMBS)]
)
def test_fault_34_a_line_of_two_gigabytes_is_rejected_in_little_memory(name, suffix, tmp_path):
    path = tmp_path / f"bomb.jsonl{suffix}"
    pack = PACKERS[suffix]
    begin, middle, end = BOMBS[name]
    block = pack(middle * ((64 << 20) // len(middle)))
    with open(path, "wb") as out:  # packed members may follow one another
        out.write(pack(good_lines()[0] + b"\n" + begin))
        for _ in range(32):
            out.write(block)
        out.write(pack(end + b"\n" + good_lines()[1] + b"\n"))
    assert path.stat().st_size < 10 << 20
    first, bomb, last = read_apart(path)
    assert [first[1], last[1]] == GOOD
    assert (bomb[0], last[0]) == (f"{path.name}:2", f"{path.name}:3")
    assert bomb[2] is not None
    assert "over-long: line, corpus.max_document_bytes is 1000000" in bomb[2]


def test_fault_34_a_packed_text_of_two_gigabytes_is_rejected_in_little_memory(tmp_path):
    path = tmp_path / "bomb.txt.zst"
    block = zstandard.compress(b"a" * (64 << 20))
    path.write_bytes(block * 32)
    assert [each[2] for each in read_apart(path)] == [
        "over-long: file, corpus.max_document_bytes is 1000000"
    ]


@pytest.mark.parametrize("part", [b"[", b'{"a":', b'{"text":['])
def test_fault_34_deep_nesting_is_rejected_and_the_next_line_read(part, tmp_path):
    lines = [part * 100_000, b'{"text": ' + part * 100_000, *good_lines()]
    (batch,) = batch_all(write_lines(tmp_path / "d.jsonl", lines))
    assert [document.text for document in batch.documents] == GOOD
    assert [reject.name for reject in batch.rejects] == ["d.jsonl:1", "d.jsonl:2"]
    assert {reject.reason for reject in batch.rejects} == {"no JSON object: nested too deep"}


def test_fault_34_lists_within_the_limit_take_little_memory(tmp_path):
    path = tmp_path / "d.jsonl"
    write_lines(path, [b'{"text": [' + b"[]," * (MAX_BYTES // 3) + b"[]]}", *good_lines()])
    assert [each[1] for each in read_apart(path)[1:]] == GOOD


WRITE_HUGE_CELL = """
import sys, pyarrow as pa, pyarrow.parquet as pq
path, compression, dictionary = sys.argv[1], sys.argv[2], sys.argv[3] == "dictionary"
schema = pa.schema({"id": pa.string(), "text": pa.string()})
options = {"compression": compression, "use_dictionary": dictionary, "write_statistics": False}
with pq.ParquetWriter(path, schema, **options) as out:
    for texts in (["the first good text"], ["a" * (400 << 20)], ["the second"]):
        ids = [text[:5] for text in texts]
        out.write_table(pa.table({"id": ids, "text": texts}, schema=schema))
"""


@pytest.mark.parametrize("encoding", ["plain", "dictionary"])
def test_fault_34_a_huge_parquet_cell_costs_its_row_group_and_little_memory(encoding, tmp_path):
    path = tmp_path / "bomb.parquet"
    command = [sys.executable, "-c", WRITE_HUGE_CELL, str(path), "zstd", encoding]
    subprocess.run(command, check=True, timeout=300)
    assert path.stat().st_size < 10 << 20
    first, bomb, last = read_apart(path)
    assert [first[1], last[1]] == GOOD
    assert bomb[0] == "bomb.parquet:2-2"
    assert bomb[2] is not None
    assert "over-long: 1 rows not read, a page has" in bomb[2]


def test_fault_34_one_cell_of_a_dictionary_repeated_in_every_row_takes_little_memory(tmp_path):
    text = "a" * (22 << 20)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 200, pa.int32()), pa.array([text]))
    pq.write_table(
        pa.table({"text": column}), tmp_path / "d.parquet", dictionary_pagesize_limit=1 << 30
    )
    assert len(read_apart(tmp_path / "d.parquet")) == 200


def test_fault_34_nested_columns_are_no_text_and_no_names(tmp_path):
    cells = pa.array([["a"] * 3] * 2)
    pq.write_table(pa.table({"text": cells}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": GOOD, "id": cells}), tmp_path / "b.parquet")
    bad, *good = read_all(tmp_path)
    assert bad.fault is not None
    assert "its column 'text' holds list<element: string>, not text" in bad.fault
    assert [(each.doc_id, each.text) for each in good] == [
        ("b.parquet:1", GOOD[0]),
        ("b.parquet:2", GOOD[1]),
    ]


def test_fault_34_pages_are_as_large_as_their_headers_say(tmp_path):
    for version in ("1.0", "2.0"):
        path = tmp_path / f"{version}.parquet"
        texts = ["x" * 5000 + str(number) for number in range(500)]
        pq.write_table(
            pa.table({"text": texts, "id": ["i"] * 500}),
            path,
            data_page_version=version,
            data_page_size=100_000,
            write_batch_size=1,
            use_dictionary=["id"],
        )
        with open(path, "rb") as stream:
            (chunks,) = list_chunks(read_footer(stream), ["text", "id"], "parquet-cpp")
            text = find_largest_page(stream, chunks, ["text"])
            name = find_largest_page(stream, chunks, ["id"])
        assert 100_000 <= text < 110_000
        assert 0 < name < 1000


def test_the_chunks_of_a_footer_are_those_that_pyarrow_lists(tmp_path):
    path = tmp_path / "d.parquet"
    nested = [{"a": [1, 2], "b": {"c": "x"}}, {"a": [], "b": {"c": None}}] * 50
    columns = {"text": [f"text {i}" for i in range(100)], "id": range(100), "nested": nested}
    table = pa.table(columns).replace_schema_metadata({"key": "value" * 100})
    options = {"write_page_index": True, "store_decimal_as_integer": True, "use_dictionary": ["id"]}
    pq.write_table(table, path, row_group_size=33, **options)
    metadata = pq.read_metadata(path)
    with open(path, "rb") as stream:
        paths = [metadata.schema.column(i).path for i in range(len(metadata.schema))]
        found = list_chunks(read_footer(stream), paths, metadata.created_by)
    assert len(found) == metadata.num_row_groups == 4
    for number, chunks in enumerate(found):
        group = metadata.row_group(number)
        expected = [group.column(i) for i in range(group.num_columns)]
        assert [(each.column, each.num_bytes) for each in chunks] == [
            (each.path_in_schema, each.total_compressed_size) for each in expected
        ]
        starts = [
            min(filter(None, (each.dictionary_page_offset, each.data_page_offset)))
            for each in expected
        ]
        assert [each.start for each in chunks] == starts


def test_a_footer_with_malformed_statistics_does_not_end_the_process(tmp_path):
    """pyarrow's object of such a column chunk ends it by an exception that C++ does not catch."""
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"text": GOOD}), path)
    footer_bytes = int.from_bytes(path.read_bytes()[-8:-4], "little")
    data = path.read_bytes()
    start = len(data) - 8 - footer_bytes
    given = 0
    for at in range(start, len(data) - 8):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            path.write_bytes(flipped)
            documents = []
            with suppress(UserError):
                documents = read_all(tmp_path)
            given += sum(document.text == GOOD[0] for document in documents)
    assert 0 < given < 8 * footer_bytes  # some flips change nothing that matters, others do


ZIGZAG_2_62 = bytes([0xFF] * 8 + [0x7F])


@pytest.mark.parametrize(
    ("footer", "reason"),
    [
        (b"\x19\xf7" + ZIGZAG_2_62, "no valid footer"),  # a list of doubles, endless
        (b"\x19\xfc" + ZIGZAG_2_62 + bytes(2_100_000), "too many parts"),
        (b"\x15\x02\x05\x02\x02\x00", "no valid header"),  # field 1 twice
        (b"\x1c" * 40, "no valid"),
        (b"\x18\x7fshort", "no valid footer"),
        (b"\x00", "no valid footer"),
    ],
    ids=["endless list", "long list", "repeated field", "nested", "short", "empty"],
)
def test_a_hostile_footer_is_refused_at_once(footer, reason):
    with pytest.raises(ValueError, match=reason):
        list_chunks(footer, [], "")


def test_a_chunk_of_another_column_than_the_schemas_is_refused(tmp_path):
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"text": GOOD}), path)
    data = path.read_bytes()
    place = data.index(b"\x19\x18\x04text")  # a list of one text: the chunk's path
    path.write_bytes(data[: place + 3] + b"tex_" + data[place + 7 :])
    (only,) = read_all(tmp_path)
    assert "not those of its schema" in str(only.fault)


def test_fault_34_a_header_that_lies_is_a_fault_of_its_file(tmp_path):
    plain = tmp_path / "plain.parquet"
    pq.write_table(
        pa.table({"text": ["hello world " * 99]}), plain, compression="zstd", use_dictionary=False
    )
    data = plain.read_bytes()
    place = pq.read_metadata(plain).row_group(0).column(0).data_page_offset
    lies = [
        data[:place] + bytes([0x15, 0, 0x15, *varint, 0x15]) + data[place + 6 :]
        for varint in (b"\xfe\xff\xff\xff\x0f", b"\xff\xff\xff\xff\x0f", b"\xff" * 12)
    ]
    lies += [data[:place] + b"\xff" * 64 + data[place + 64 :], data[:place] + bytes(len(data))]
    lies += [data[:-8] + b"\xff\xff\xff\x7fPAR1", data[:-8] + b"\x00\x00\x00\x00PAR1"]
    for number, lie in enumerate(lies):
        path = tmp_path / f"lie{number}.parquet"
        path.write_bytes(lie)
        (only,) = read_apart(path)
        assert only[2], number


def test_fault_34_a_zst_window_larger_than_memory_is_a_fault_of_its_file(tmp_path):
    frame = b"\x28\xb5\x2f\xfd" + bytes([0x00, 31 << 3]) + b"\x01\x00\x00"
    (tmp_path / "d.jsonl.zst").write_bytes(frame + b"x" * 100)
    (only,) = read_apart(tmp_path / "d.jsonl.zst")
    assert "corrupt" in str(only[2])


def test_fault_34_rejects_alone_fill_shards_too(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", [b"{}"] * 5000)
    batches = batch_all(path, shard_bytes=1000)
    assert [len(batch.rejects) for batch in batches] == [500] * 10
    assert not has_one_shard(list_files(path), 1000)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_every_reject_of_a_damaged_file_is_short_and_says_nothing_of_its_content(suffix, tmp_path):
    lines = good_lines() + [json.dumps({"text": CANARY * 30 + str(i)}).encode() for i in range(999)]
    data = PACKERS[suffix](b"\n".join(lines))
    for number, place in enumerate(range(0, len(data), max(1, len(data) // 40))):
        path = tmp_path / f"{number}.jsonl{suffix}"
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        for batch in batch_all(path):
            check_rejects(batch)
