"""What tests of hostile, damaged and changing files share."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from rayfuse.config.corpus import DocumentsSettings
from rayfuse.corpus.documents import Document, read_documents
from rayfuse.corpus.shards import (
    DocumentBatch,
    Part,
    batch_documents,
    build_rows,
)
from rayfuse.models.text_tokenizer import TextTokenizer, build_tokenizer
from rayfuse.run.inputs import InputFile, list_inputs
from tests.fakes import byte_level_tokenizer, sentencepiece_tokenizer

TOKENIZERS = [
    build_tokenizer(byte_level_tokenizer(280).to_str(), start_id=0, eos_id=0),
    build_tokenizer(sentencepiece_tokenizer(330).to_str(), start_id=1, eos_id=2),
]
WHOLE = Part(0.0, False)
GOOD = ["the first good text", "the second"]
CANARY = "canary-4711"
MAX_BYTES = 1_000_000
BOUND_BYTES = 300 << 20
REAL = (
    "bert-base-uncased",
    "gpt-neox-20b",
    "gpt2",
    "mistral-7b",
    "open-llama-3b",
    "phi-3-mini",
    "stories260k",
    "t5-small",
)


def list_files(path: Path | str) -> list[InputFile]:
    return list_inputs(DocumentsSettings(path=str(path)), "corpus.documents").files


def read_all(path: Path | str, max_bytes: int = MAX_BYTES) -> list[Document]:
    return [document for file in list_files(path) for document in read_documents(file, max_bytes)]


def batch_all(path: Path, *, max_bytes: int = MAX_BYTES, shard_bytes=10**6) -> list[DocumentBatch]:
    documents = read_all(path, max_bytes)
    return list(
        batch_documents(documents, WHOLE, shard_bytes=shard_bytes, max_document_bytes=max_bytes)
    )


def build_batch(
    batch: DocumentBatch, tokenizers: Sequence[TextTokenizer] = TOKENIZERS, max_tokens: int = 24
) -> pa.Table:
    return build_rows(batch.documents, tokenizers[0], tokenizers, max_tokens=max_tokens)


def write_lines(path: Path, lines: Sequence[bytes]) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def good_lines() -> list[bytes]:
    return [json.dumps({"text": text}).encode() for text in GOOD]


def good_texts(documents: Sequence[Document]) -> list[str]:
    return [document.text for document in documents if document.fault is None]


def check_rejects(batch: DocumentBatch) -> None:
    for reject in batch.rejects:
        assert reject.name.strip()
        assert 3 < len(reject.reason) < 300
        assert CANARY not in reject.reason
        assert reject.reason.isprintable()
