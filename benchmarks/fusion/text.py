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

RESERVED_BYTES = 150_000
"""Text of each domain's training documents that the regimes reserve for their reported half."""


def read_domain(data: Path, domain: str, part: str) -> list[Document]:
    """Read the documents of a domain's `train` or `valid` part, in the file's order."""
    with gzip.open(data / "corpus" / domain / f"{part}.jsonl.gz", "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return [Document(record["id"], domain, record["text"]) for record in records]


def split_domain(documents: Sequence[Document], seed: int) -> tuple[list[Document], list[Document]]:
    """Split documents into those for pre-training and those for fusion, in the seed's order."""
    ordered = _order(documents, seed)
    cut = round(PRETRAIN_SHARE * len(ordered))
    return ordered[:cut], ordered[cut:]


def reserve(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Split a domain's training documents into those reserved for evaluation, and the others.

    Pieces of one text (`NAME#0`, `NAME#1`) are never divided between the two.
    """
    texts: dict[str, list[Document]] = {}
    for document in documents:
        texts.setdefault(document.doc_id.partition("#")[0], []).append(document)
    reserved: list[Document] = []
    others: list[Document] = []
    room = RESERVED_BYTES
    for name in sorted(
        texts, key=lambda name: hashlib.sha256(f"reserved:{name}".encode()).digest()
    ):
        size = sum(len(document.text.encode()) for document in texts[name])
        # A book would be half of the reserve, and few texts are a bad sample.
        is_reserved = room > 0 and size <= RESERVED_BYTES / 3
        (reserved if is_reserved else others).extend(texts[name])
        room -= size if is_reserved else 0
    return reserved, others


def split_training(
    data: Path, domain: str, seed: int, split_seed: int | None
) -> tuple[list[Document], list[Document]]:
    """Split a domain's training documents into those for pre-training and those for fusion.

    Args:
        data: The folder of the text.
        domain: One of `DOMAINS`.
        seed: Decides the order of the documents and, without `split_seed`, the split.
        split_seed: Decides the split of all seeds, of the documents that are not reserved.
    """
    documents = read_domain(data, domain, "train")
    if split_seed is None:
        return split_domain(documents, seed)
    pretraining, fusion = split_domain(reserve(documents)[1], split_seed)
    return _order(pretraining, seed), _order(fusion, seed)


def read_pretraining(data: Path, seed: int, *, split_seed: int | None = None) -> list[Document]:
    """Read the documents for pre-training, which fusion never sees."""
    return [
        document
        for domain in DOMAINS
        for document in split_training(data, domain, seed, split_seed)[0]
    ]


def read_fusion(
    data: Path,
    seed: int,
    bytes_per_domain: int,
    max_chars: int,
    *,
    split_seed: int | None = None,
) -> list[Document]:
    """Read the fusion corpus: the first documents of each domain that no model has seen.

    Documents are truncated to `max_chars`, and the last one of a domain to the remaining bytes. A
    smaller corpus is the beginning of a larger one.

    Raises:
        ValueError: A domain has less text.
    """
    chosen: list[Document] = []
    for domain in DOMAINS:
        room = bytes_per_domain
        for document in split_training(data, domain, seed, split_seed)[1]:
            text = document.text[:max_chars].encode()[:room].decode(errors="ignore")
            room -= len(text.encode())
            if text.strip():
                chosen.append(Document(document.doc_id, domain, text))
            if room <= 0:
                break
        if room > 0:
            raise ValueError(
                f"{domain} has {bytes_per_domain - room:,} bytes for fusion in documents of at "
                f"most {max_chars:,} characters, fewer than {bytes_per_domain:,}"
            )
    return chosen


def read_held_out(
    data: Path, half: str, *, max_documents: int, max_chars: int, has_reserve: bool = False
) -> list[Document]:
    """Read one half of the held-out documents, truncated to `max_chars`.

    The halves are every second document of the `valid` parts; with a reserve, the reported half is
    the reserve, because earlier choices were made on all of the `valid` parts.
    """
    chosen: list[Document] = []
    for domain in DOMAINS:
        if has_reserve and half == "reported":
            mine = _order(reserve(read_domain(data, domain, "train"))[0], 0)
        else:
            mine = _order(read_domain(data, domain, "valid"), 0)[HALVES.index(half) :: 2]
        chosen += [
            Document(document.doc_id, domain, document.text[:max_chars])
            for document in mine[:max_documents]
        ]
    return chosen


def _order(documents: Sequence[Document], seed: int) -> list[Document]:
    return sorted(
        documents,
        key=lambda document: hashlib.sha256(f"{seed}:{document.doc_id}".encode()).digest(),
    )
