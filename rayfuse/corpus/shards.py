"""Which documents go into which shard: a function of the inputs alone, never of the cluster."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from rayfuse.corpus.documents import Document
from rayfuse.corpus.split import Row, cut_document, find_fault, is_held_out
from rayfuse.models.tokenizer import TextTokenizer
from rayfuse.run.inputs import InputFile
from rayfuse.schema import CORPUS
from rayfuse.storage.dataset import Reject

BYTES_PER_TOKEN = 4
"""What `shard_tokens` takes a token of text to be."""

REJECT_BYTES = 2
"""The least that a rejected line takes in its file. Rejects are held until their shard is written:
a file of nothing else fills shards with them."""


@dataclass(frozen=True)
class Part:
    """Which of the documents a data set takes."""

    held_out_share: float
    """0 where evaluation has documents of its own."""
    takes_held_out: bool

    def takes(self, document: Document) -> bool:
        """Return whether a document belongs to this part."""
        return self.held_out_share == 0 or (
            is_held_out(document, self.held_out_share) == self.takes_held_out
        )


@dataclass
class DocumentBatch:
    """The documents of one shard, and what was rejected on the way."""

    documents: list[Document] = field(default_factory=list[Document])
    rejects: list[Reject] = field(default_factory=list[Reject])


def group_inputs(files: Sequence[InputFile], shard_bytes: int) -> list[list[InputFile]]:
    """Return runs of files that are read together: small ones joined up to a shard's size.

    A packed file, whose text may be of any length, is a run of its own.
    """
    groups: list[list[InputFile]] = []
    room = 0
    for file in files:
        if file.is_packed or file.num_bytes > room or not groups:
            groups.append([])
            room = shard_bytes
        groups[-1].append(file)
        room = 0 if file.is_packed else room - file.num_bytes
    return groups


def has_one_shard(group: Sequence[InputFile], shard_bytes: int) -> bool:
    """Return whether a group is known, without reading it, to make exactly one shard."""
    is_packed = any(file.is_packed for file in group)
    # A file may end in half a reject, and break off with one more.
    max_bytes = sum(file.num_bytes + 2 * REJECT_BYTES for file in group)
    return not is_packed and max_bytes < shard_bytes


def batch_documents(
    documents: Iterable[Document], part: Part, *, shard_bytes: int, max_document_bytes: int
) -> Iterator[DocumentBatch]:
    """Yield a part's documents in batches, each closed by the document or reject that fills it.

    At least one batch is yielded, so that rejects have a place.
    """
    batch, num_bytes, num_batches = DocumentBatch(), 0, 0
    for document in documents:
        if not part.takes(document):
            continue
        fault = find_fault(document, max_document_bytes)
        if fault is not None:
            batch.rejects.append(Reject(document.doc_id, fault))
        else:
            batch.documents.append(document)
            num_bytes += len(document.text.encode())
        if max(num_bytes, REJECT_BYTES * len(batch.rejects)) >= shard_bytes:
            yield batch
            batch, num_bytes, num_batches = DocumentBatch(), 0, num_batches + 1
    if batch.documents or batch.rejects or not num_batches:
        yield batch


def build_rows(
    documents: Sequence[Document],
    target: TextTokenizer,
    tokenizers: Sequence[TextTokenizer],
    *,
    max_tokens: int,
) -> pa.Table:
    """Return the CORPUS rows of documents.

    Args:
        documents: Without faults.
        target: The tokenizer whose ids are stored.
        tokenizers: All that each row must fit.
        max_tokens: At most this many tokens in a row.
    """
    rows: list[Row] = []
    for document in documents:
        rows += cut_document(document, tokenizers, max_tokens)
    texts, ends = [row.text for row in rows], [row.ends_document for row in rows]
    columns = {
        "row_id": [f"{row.document.doc_id}#{row.place}" for row in rows],
        "doc_id": [row.document.doc_id for row in rows],
        "domain": [row.document.domain for row in rows],
        "text": texts,
        "num_bytes": [len(text.encode()) for text in texts],
        "ends_document": ends,
        "target_ids": target.encode_rows(texts, ends),
    }
    return pa.Table.from_pydict(columns, schema=CORPUS)
