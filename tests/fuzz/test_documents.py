"""Mutated files of documents: each gives documents, rejects, or one reject for the entire file."""

import bz2
import gzip
import io
import json
import lzma
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given

from rayfuse.config.base import UserError
from rayfuse.config.corpus import DocumentsSettings
from rayfuse.corpus.documents import read_documents
from rayfuse.corpus.split import find_fault
from rayfuse.run.inputs import list_inputs
from tests.fuzz.mutations import edits, fuzz, json_edits, mutate_bytes, mutate_json

MAX_DOCUMENT_BYTES = 100_000
MAX_SECONDS = 20.0

RECORDS = [
    {"id": f"d{i}", "domain": "web", "text": f"Text {i}: the cat sat. \u00e9\u6f22 " * 3}
    for i in range(6)
]


def encode_jsonl() -> bytes:
    return "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def encode_parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(RECORDS), sink, row_group_size=2)
    return sink.getvalue()


SEEDS: dict[str, Callable[[], bytes]] = {
    ".jsonl": encode_jsonl,
    ".json": lambda: json.dumps(RECORDS).encode(),
    ".txt": lambda: b"\xef\xbb\xbf" + RECORDS[0]["text"].encode(),
    ".parquet": encode_parquet,
    ".jsonl.gz": lambda: gzip.compress(encode_jsonl()),
    ".jsonl.bz2": lambda: bz2.compress(encode_jsonl()),
    ".jsonl.xz": lambda: lzma.compress(encode_jsonl()),
    ".jsonl.zst": lambda: zstandard.ZstdCompressor().compress(encode_jsonl()),
}


def read_all(path: Path) -> None:
    """Read a file as the corpus stage does, and check what is handed on."""
    began = time.monotonic()
    try:
        files = list_inputs(DocumentsSettings(path=str(path)), "corpus.documents").files
    except UserError:
        return
    for file in files:
        for document in read_documents(file, MAX_DOCUMENT_BYTES):
            fault = find_fault(document, MAX_DOCUMENT_BYTES)
            text = "" if fault else document.text
            for stored in (document.doc_id, document.domain, text, fault or ""):
                stored.encode("utf-8")  # what is not UTF-8 cannot be stored
            if document.fault is not None:
                assert not document.text
    assert time.monotonic() - began < MAX_SECONDS


@pytest.mark.parametrize("suffix", SEEDS)
def test_a_file_of_documents_with_mutated_bytes(suffix, tmp_path):
    seed = SEEDS[suffix]()
    path = tmp_path / f"docs{suffix}"

    @fuzz(100)
    @given(edits)
    def check(drawn):
        path.write_bytes(mutate_bytes(seed, drawn))
        read_all(path)

    check()


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_file_of_documents_with_mutated_values(suffix, tmp_path):
    path = tmp_path / f"docs{suffix}"

    @fuzz(150)
    @given(json_edits)
    def check(drawn):
        value = RECORDS[0] if suffix == ".jsonl" else RECORDS
        path.write_bytes(mutate_json(value, drawn) + b"\n")
        read_all(path)

    check()


def test_documents_inside_a_mutated_compressed_file(tmp_path):
    path = tmp_path / "docs.jsonl.gz"

    @fuzz(100)
    @given(edits)
    def check(drawn):
        path.write_bytes(gzip.compress(mutate_bytes(encode_jsonl(), drawn)))
        read_all(path)

    check()
