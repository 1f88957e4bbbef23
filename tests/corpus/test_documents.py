import gzip
import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from rayfuse.config.base import UserError
from rayfuse.config.corpus import DocumentsSettings
from rayfuse.corpus.documents import Document, read_documents
from rayfuse.run.inputs import list_inputs

RECORDS = [{"id": "a", "domain": "x", "text": "eins"}, {"id": "b", "text": "zwei\n"}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
MAX_BYTES = 1_000_000
EXPECTED = [("a", "x", "eins"), ("b", "", "zwei\n")]


def read_all(path: Path | str, **settings: str) -> list[Document]:
    found = list_inputs(DocumentsSettings(path=str(path), **settings), "corpus.documents")
    return [document for file in found.files for document in read_documents(file, MAX_BYTES)]


def triples(documents: list[Document]) -> list[tuple[str, str, str]]:
    assert all(document.fault is None for document in documents)
    return [(document.doc_id, document.domain, document.text) for document in documents]


def test_json_lines_plain_gz_and_zst_read_the_same(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(LINES))
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        assert triples(read_all(tmp_path / name)) == EXPECTED


def test_a_folder_and_a_pattern_read_files_in_order_of_their_names(tmp_path):
    for name in ("2.txt", "1.txt", "3.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert [document.text for document in read_all(tmp_path)] == ["1.txt", "2.txt", "3.md"]
    assert [document.text for document in read_all(tmp_path / "*.txt")] == ["1.txt", "2.txt"]


def test_parquet_reads_like_json_lines(tmp_path):
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "d.parquet")
    assert triples(read_all(tmp_path / "d.parquet")) == EXPECTED


def test_a_saved_hugging_face_data_set_reads_like_json_lines(tmp_path):
    import datasets

    datasets.Dataset.from_list(RECORDS).save_to_disk(str(tmp_path / "data"))
    assert triples(read_all(tmp_path / "data")) == EXPECTED


def test_a_saved_data_set_with_a_foreign_type_is_refused_by_name(tmp_path):
    import datasets
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    datasets.Dataset.from_list(RECORDS).save_to_disk(str(tmp_path / "data"))
    (file,) = (tmp_path / "data").glob("*.arrow")
    storage = pa.array([pickle.dumps(text) for text in "ab"], pa.large_binary())
    column = pa.ExtensionArray.from_storage(ArrowPythonObjectType(), storage)
    table = pa.table({"text": column})
    with pa.OSFile(str(file), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(
        UserError, match=r"data', split 'train', cannot be loaded: .*pickled_object"
    ):
        read_all(tmp_path / "data")


def test_a_domain_of_the_recipe_wins_over_the_documents_own(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    assert {document.domain for document in read_all(tmp_path / "a.jsonl", domain="z")} == {"z"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}', "invalid UTF-8"),
        (b"no json", "no JSON object"),
        (b"[1]", "no JSON object"),
        (b'{"text": 3}', "field 'text' holds no text"),
        (b'{"body": "x"}', "field 'text' holds no text"),
    ],
)
def test_a_bad_line_is_named_with_its_reason_and_the_next_is_read(line, reason, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line + b"\n" + LINES)
    bad, *good = read_all(tmp_path / "a.jsonl")
    assert bad.doc_id == "a.jsonl:1"
    assert bad.fault is not None
    assert reason in bad.fault
    assert triples(good) == EXPECTED


def test_invalid_utf8_in_parquet_is_a_fault_of_that_row(tmp_path):
    texts = pa.array([b"fine", b"\xff\xfe"], type=pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "d.parquet")
    good, bad = read_all(tmp_path / "d.parquet")
    assert good.text == "fine"
    assert bad.fault is not None
    assert "invalid UTF-8" in bad.fault


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b"no parquet"),
        ("a.jsonl.gz", b"no gzip"),
        ("b.jsonl.gz", gzip.compress(LINES * 1000, mtime=0)[:-20]),
        ("a.jsonl.zst", b"no zstandard"),
    ],
    ids=["parquet", "gzip", "gzip cut off", "zstandard"],  # all processes must see the same names
)
def test_a_file_that_is_not_what_its_name_says_is_a_fault_and_no_crash(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    last = read_all(tmp_path / name)[-1]
    assert last.fault is not None
    assert "corrupt" in last.fault


def test_a_path_without_documents_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"corpus.documents is .*no documents were found"):
        read_all(tmp_path / "nowhere")


def test_a_file_of_unknown_kind_is_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a name without a known format; set format"):
        read_all(tmp_path / "a.bin")
