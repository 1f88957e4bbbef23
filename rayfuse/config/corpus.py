"""The documents of a run, and how they are split into rows."""

from typing import Annotated, Literal, cast

from pydantic import (
    BeforeValidator,
    Field,
    PositiveInt,
)

from rayfuse.config.base import Settings, Share, result_neutral


class DocumentsSettings(Settings):
    """Where documents are stored and how they are read."""

    path: str
    """A file, a folder, a pattern such as `s3://bucket/*.parquet`, or a data set on the hub. Of a
    folder, names that begin with `.` or `_`, READMEs and the like, and unknown kinds are skipped. A
    document without a field `id` is named by its file's path below the folder, and its line."""
    format: Literal["auto", "jsonl", "parquet", "text", "dataset"] = "auto"
    """`auto`: by the file's name, before `.gz`, `.zst`, `.xz` or `.bz2`. `dataset`: a Hugging Face
    data set, a folder or a hub id."""
    text: str = "text"
    """The field or column that holds the text."""
    domain: str | None = None
    """The domain of all these documents; without it, each document's own field `domain`."""
    split: str = "train"
    """The split of a Hugging Face data set."""


def _list_documents(value: object) -> object:
    """Expand the short forms `documents: PATH` and `documents: [PATH, {path: PATH, ...}]`."""
    items = cast(list[object], value) if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


Documents = Annotated[
    tuple[DocumentsSettings, ...],
    BeforeValidator(
        _list_documents,
        json_schema_input_type=str | DocumentsSettings | list[str | DocumentsSettings],
    ),
    Field(min_length=1),
]


class CorpusSettings(Settings):
    """How documents become rows that fit every tokenizer of the recipe."""

    documents: Documents
    """The text to learn from."""
    max_tokens: Annotated[int, Field(ge=16)] = 2048
    """Maximum tokens of a row, by the count of every tokenizer, special tokens included."""
    shard_tokens: PositiveInt = 1_000_000
    """Approximate tokens of a shard, estimated at four bytes of text per token."""
    max_document_bytes: PositiveInt = 50_000_000
    """Documents longer than this are rejected: a dump that lost its line ends, most likely."""
    max_rejected_share: Share = result_neutral(0.1)
    """Maximum share of the documents that may be rejected, empty ones not counted, and of the files
    that may be unreadable, before the run stops."""
    resplit: bool = result_neutral(False)
    """Split the documents for the tokenizers of this recipe, even if they were split for another
    recipe. By default the first segmentation is reused, so that captured data stays valid; a source
    or target that is added later may then need more than max_tokens for a row."""
