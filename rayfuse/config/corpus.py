"""The documents of a run, and how they are split into rows."""

from typing import Annotated, Literal, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveInt,
    model_validator,
)

from rayfuse.config.base import Settings, Share, later_setting, result_neutral


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
    messages: str | tuple[str, str] | None = later_setting(None)
    """For conversations: the field with the list of messages (`role` and `content`, or `from` and
    `value`), in place of a text; or two fields, of prompts and of responses. Only answers are
    learned, each model sees its own chat template."""
    thinking: Literal["keep", "drop", "context"] = later_setting("keep")
    """The `<think>` parts of answers: learned, removed, or shown to the models and not learned."""
    domain: str | None = None
    """The domain of all these documents; without it, each document's own field `domain`."""
    split: str = "train"
    """The split of a Hugging Face data set."""

    def list_fields(self) -> tuple[str, ...]:
        """List the fields that the text or the messages are read from."""
        if self.messages is None:
            return (self.text,)
        return (self.messages,) if isinstance(self.messages, str) else self.messages

    @model_validator(mode="after")
    def _check_format(self) -> "DocumentsSettings":
        if self.messages is not None and self.format == "text":
            raise ValueError(
                f"messages is {self.messages!r}, but files of format text have no fields; save "
                "conversations as JSON Lines or Parquet, or remove messages"
            )
        return self


def _list_documents(value: object) -> object:
    """Expand the short forms `documents: PATH` and `documents: [PATH, {path: PATH, ...}]`."""
    items = cast(list[object], value) if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


def _check_same_kind(documents: tuple[DocumentsSettings, ...]) -> tuple[DocumentsSettings, ...]:
    """Check that either all or none of the entries are conversations.

    Raises:
        ValueError: They are mixed.
    """
    if len({entry.messages is None for entry in documents}) > 1:
        plain = next(entry.path for entry in documents if entry.messages is None)
        raise ValueError(
            f"{plain!r} is plain text and others are conversations (messages); make two runs, or "
            "give all entries messages"
        )
    return documents


Documents = Annotated[
    tuple[DocumentsSettings, ...],
    BeforeValidator(
        _list_documents,
        json_schema_input_type=str | DocumentsSettings | list[str | DocumentsSettings],
    ),
    Field(min_length=1),
    AfterValidator(_check_same_kind),
]


class CorpusSettings(Settings):
    """How documents become rows that fit every tokenizer of the recipe."""

    documents: Documents
    """The text to learn from; conversations, if all entries set `messages`."""
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

    @property
    def is_chat(self) -> bool:
        """Whether the documents are conversations."""
        return self.documents[0].messages is not None
