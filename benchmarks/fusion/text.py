"""The documents of a study: those for pre-training, for fusion and for evaluation."""

import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.fusion.scales import DOMAINS
from rayfuse.corpus.documents import Document

PRETRAIN_SHARE = 0.5
"""Share of each domain's training documents for pre-training; fusion has the others."""

HALVES = ("selection", "reported")


def read_domain(data: Path, domain: str, part: str) -> list[Document]:
    """Read the documents of a domain's `train` or `valid` part, in the file's order."""
    with gzip.open(data / "corpus" / domain / f"{part}.jsonl.gz", "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return [Document(record["id"], domain, record["text"]) for record in records]


def split_domain(documents: Sequence[Document], seed: int) -> tuple[list[Document], list[Document]]:
    """Split documents into those for pre-training and those for fusion, in the seed's order."""
    ordered = sorted(documents, key=lambda document: _draw(document, seed))
    cut = round(PRETRAIN_SHARE * len(ordered))
    return ordered[:cut], ordered[cut:]


def read_pretraining(data: Path, seed: int) -> list[Document]:
    """Read the documents for pre-training, which fusion never sees."""
    return [
        document
        for domain in DOMAINS
        for document in split_domain(read_domain(data, domain, "train"), seed)[0]
    ]


def read_fusion(data: Path, seed: int, bytes_per_domain: int, max_chars: int) -> list[Document]:
    """Read the fusion corpus: the first documents of each domain that no model has seen.

    Documents are truncated to `max_chars`, and the last one of a domain to the remaining bytes. A
    smaller corpus is the beginning of a larger one.
    """
    chosen: list[Document] = []
    for domain in DOMAINS:
        room = bytes_per_domain
        for document in split_domain(read_domain(data, domain, "train"), seed)[1]:
            text = document.text[:max_chars].encode()[:room].decode(errors="ignore")
            room -= len(text.encode())
            if text.strip():
                chosen.append(Document(document.doc_id, domain, text))
            if room <= 0:
                break
    return chosen


def read_held_out(data: Path, half: str, *, max_documents: int, max_chars: int) -> list[Document]:
    """Read one half of the `valid` parts: every second document, truncated to `max_chars`."""
    chosen: list[Document] = []
    for domain in DOMAINS:
        ordered = sorted(
            read_domain(data, domain, "valid"), key=lambda document: _draw(document, 0)
        )
        mine = ordered[HALVES.index(half) :: 2][:max_documents]
        chosen += [
            Document(document.doc_id, domain, document.text[:max_chars]) for document in mine
        ]
    return chosen


def _draw(document: Document, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{document.doc_id}".encode()).digest()
