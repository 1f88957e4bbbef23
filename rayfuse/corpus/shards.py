"""Assignment of documents to shards: a function of the inputs alone, never of the cluster."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from rayfuse.corpus.documents import Document
from rayfuse.corpus.split import Row, find_fault, is_held_out, split_document
from rayfuse.corpus.turns import split_conversation
from rayfuse.models.chat import ChatError, ChatFormat, ChatTokens
from rayfuse.models.tokenizer import TextTokenizer
from rayfuse.run.inputs import InputFile
from rayfuse.schema import CORPUS, MESSAGES
from rayfuse.storage.chat_columns import append_answers, encode_messages
from rayfuse.storage.rejects import Reject

BYTES_PER_TOKEN = 4
"""Assumed text bytes of a token, by which `shard_tokens` is converted."""

REJECT_BYTES = 2
"""Minimum bytes of a rejected line in its file. Rejects stay in memory until their shard is
written, so a file of rejects alone is divided into shards as well."""


@dataclass(frozen=True)
class Part:
    """The part of the documents that goes into a data set."""

    held_out_share: float
    """0 if evaluation has documents of its own."""
    takes_held_out: bool

    def takes(self, document: Document) -> bool:
        """Decide whether a document belongs to this part."""
        return self.held_out_share == 0 or (
            is_held_out(document, self.held_out_share) == self.takes_held_out
        )


@dataclass
class DocumentBatch:
    """The documents of one shard, and the rejects read before or between them."""

    documents: list[Document] = field(default_factory=list[Document])
    rejects: list[Reject] = field(default_factory=list[Reject])


def group_inputs(files: Sequence[InputFile], shard_bytes: int) -> list[list[InputFile]]:
    """Group files that are read together: small ones are joined up to the size of a shard.

    A compressed file is a group of its own, since its text may have any length.
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
    """Decide from sizes alone whether a group is certain to make exactly one shard."""
    is_packed = any(file.is_packed for file in group)
    # A file may end in an incomplete reject, and a read error adds one more.
    max_bytes = sum(file.num_bytes + 2 * REJECT_BYTES for file in group)
    return not is_packed and max_bytes < shard_bytes


def batch_documents(
    documents: Iterable[Document], part: Part, *, shard_bytes: int, max_document_bytes: int
) -> Iterator[DocumentBatch]:
    """Yield a part's documents in batches; a batch ends with the document or reject that fills it.

    At least one batch is yielded, so that every reject belongs to a shard.
    """
    batch, num_bytes, num_batches = DocumentBatch(), 0, 0
    for document in documents:
        if not part.takes(document):
            continue
        fault = find_fault(document, max_document_bytes)
        if fault is not None:
            batch.rejects.append(
                Reject(document.doc_id, fault, document.file, document.num_documents)
            )
        else:
            batch.documents.append(document)
            num_bytes += len(document.full_text.encode())
        if max(num_bytes, REJECT_BYTES * len(batch.rejects)) >= shard_bytes:
            yield batch
            batch, num_bytes, num_batches = DocumentBatch(), 0, num_batches + 1
    if batch.documents or batch.rejects or not num_batches:
        yield batch


def build_chat_rows(
    documents: Sequence[Document],
    target: ChatFormat,
    formats: Sequence[ChatFormat],
    *,
    max_tokens: int,
) -> tuple[pa.Table, list[Document], list[Reject]]:
    """Divide conversations into CORPUS rows; reject those that a template cannot represent.

    Args:
        documents: Conversations without a fault.
        target: The target's template and tokenizer; its ids are stored.
        formats: Each row fits all of them.
        max_tokens: Maximum tokens of a row.

    Returns:
        The rows, the conversations that they are made of, and the rejects.
    """
    rows: list[Row] = []
    kept: list[Document] = []
    rejects: list[Reject] = []
    tokens: list[ChatTokens] = []
    for document in documents:
        try:
            own = split_conversation(document, formats, max_tokens)
            tokens += [target.encode_one(row.messages) for row in own]
        except ChatError as error:
            rejects.append(Reject(document.doc_id, f"unusable messages: {error}", document.file))
        else:
            rows += own
            kept.append(document)
    table = _build_table(rows, [row.ids for row in tokens])
    table = table.append_column(
        MESSAGES, pa.array([encode_messages(row.messages) for row in rows], MESSAGES.type)
    )
    return append_answers(table, tokens), kept, rejects


def build_rows(
    documents: Sequence[Document],
    target: TextTokenizer,
    tokenizers: Sequence[TextTokenizer],
    *,
    max_tokens: int,
) -> pa.Table:
    """Split documents into CORPUS rows.

    Args:
        documents: Documents without a fault.
        target: The target's tokenizer; its ids are stored.
        tokenizers: Each row fits all of them.
        max_tokens: Maximum tokens of a row.
    """
    rows: list[Row] = []
    for document in documents:
        rows += split_document(document, tokenizers, max_tokens)
    texts, ends = [row.text for row in rows], [row.ends_document for row in rows]
    return _build_table(rows, target.encode_rows(texts, ends))


def _build_table(rows: Sequence[Row], target_ids: Sequence[Int[np.ndarray, " _"]]) -> pa.Table:
    texts = [row.text for row in rows]
    columns = {
        "row_id": [f"{row.document.doc_id}#{row.place}" for row in rows],
        "doc_id": [row.document.doc_id for row in rows],
        "domain": [row.document.domain for row in rows],
        "text": texts,
        "num_bytes": [len(text.encode()) for text in texts],
        "ends_document": [row.ends_document for row in rows],
        "target_ids": target_ids,
    }
    return pa.Table.from_pydict(columns, schema=CORPUS)
