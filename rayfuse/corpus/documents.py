"""Read documents from one file, one at a time and in bounded memory, for any file content."""

import codecs
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import pyarrow as pa

from rayfuse.config.base import UserError, user_error_from
from rayfuse.config.corpus import DocumentsSettings
from rayfuse.corpus.conversations import parse_messages
from rayfuse.corpus.json_array import read_array
from rayfuse.corpus.parquet_guard import find_largest_page, list_chunks
from rayfuse.models.chat import Message
from rayfuse.run.inputs import InputFile, check_unchanged, is_saved_dataset
from rayfuse.run.open_input import (
    BUFFER_BYTES,
    MAX_EXPANSION,
    UNPACK_ERRORS,
    max_text_bytes,
    open_input,
    split_name,
)
from rayfuse.storage.parquet import open_parquet, read_footer

ESCAPE_BYTES = 6
"""Bytes of the longest form of one character in JSON, `\\u0041`."""

MIB = 1 << 20

LINE_ROOM_BYTES = MIB
"""Bytes that a JSON line may have besides the longest text."""

SKIP_BYTES = MIB
"""Bytes of an over-long line that are read at a time."""

PAGE_ROOM_BYTES = 24 * MIB
"""Bytes that a Parquet page may have besides the longest text; the usual page size is 1 MiB."""

BATCH_BYTES = 24 * MIB
"""Bytes of Parquet rows that are in memory at a time; of longer ones, a row at a time."""

MAX_BATCH_ROWS = 256
"""Rows of a Parquet batch: their Python objects take more memory than their bytes."""

MAX_NAME_CHARS = 2048
"""Maximum length of a document's id or domain, which each of its rows repeats."""

MAX_REASON_CHARS = 200
"""Maximum length of a reader's error in a reason, which may quote any part of a file."""

MIN_DOCUMENT_BYTES = 1000
"""What a document or a reject counts as, at least, towards the text that a file may have."""

UNREADABLE = "unreadable file"
"""The kind of a reject that stands for a file, or for the rest of it."""

READ_ERRORS = (OSError, ValueError, pa.ArrowException, zlib.error, *UNPACK_ERRORS)
"""Errors of the readers for a file whose content does not match its format."""


@dataclass(frozen=True)
class Document:
    """A text with its id; or, with `fault`, the reason why there is no text in this place."""

    doc_id: str
    domain: str
    text: str
    """Of a conversation, all answers end to end."""
    fault: str | None = None
    """The kind of the fault, and after a colon its details."""
    file: str = ""
    """The name of its file, where there is a fault."""
    num_documents: int = 1
    """How many documents are lost by the fault, where this is known."""
    messages: tuple[Message, ...] = ()
    """Of a conversation."""

    @property
    def full_text(self) -> str:
        """All text, of a conversation that of all messages."""
        return "".join(message.text for message in self.messages) if self.messages else self.text


def read_documents(file: InputFile, max_document_bytes: int) -> Iterator[Document]:
    """Yield a file's documents in order; those without text have a `fault`.

    A read error in the middle yields one last document with the reason; the documents before it
    are kept. So does a file that makes far more documents than its size can hold.

    Args:
        file: As listed.
        max_document_bytes: Of a longer document, little more than this is held in memory.

    Raises:
        UserError: The file has changed since it was listed, or a data set cannot be loaded.
        OSError: The storage fails; the file itself may be sound.
    """
    readers = {
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
        "text": _read_text,
        "dataset": _read_dataset,
    }
    check_unchanged(file)
    max_bytes, num_bytes = max_text_bytes(file.num_bytes), 0
    try:
        for document in readers[file.format](file, max_document_bytes):
            yield document if document.fault is None else replace(document, file=file.name)
            num_bytes += max(len(document.full_text), MIN_DOCUMENT_BYTES)
            if num_bytes > max_bytes and file.format != "dataset":
                raise ValueError(f"more documents than {file.num_bytes} bytes can hold")
    except READ_ERRORS as error:
        if _is_of_storage(error) or isinstance(error, UserError):
            raise
        reason = f"{UNREADABLE}: it is no {file.format} file or is corrupt: {_shorten(error)}"
        yield Document(_printable(file.path), _domain_of(file), "", reason, file.name)
    check_unchanged(file)


def _is_of_storage(error: BaseException) -> bool:
    """Recognise an error of the storage by its errno or as a network error."""
    is_of_system = isinstance(error, OSError) and error.errno is not None
    return is_of_system or isinstance(error, ConnectionError | TimeoutError)


def _shorten(error: BaseException) -> str:
    text = _printable(" ".join(str(error).split()))
    return text if len(text) <= MAX_REASON_CHARS else text[: MAX_REASON_CHARS - 3] + "..."


def _printable(name: str) -> str:
    """Convert a file name to valid Unicode: file systems allow names that are not."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _read_jsonl(file: InputFile, max_document_bytes: int) -> Iterator[Document]:
    with open_input(file.path, file.num_bytes) as stream:
        start = stream.peek().removeprefix(codecs.BOM_UTF8).lstrip()
        if start.startswith(b"[") and split_name(file.path)[1] == ".json":
            elements = read_array(stream, max_document_bytes + LINE_ROOM_BYTES)
            for number, element in enumerate(elements, 1):
                yield _make_document(file, f"{file.name}:{number}", element)
        else:
            yield from _read_lines(file, stream, max_document_bytes)


def _read_lines(file: InputFile, stream: Any, max_document_bytes: int) -> Iterator[Document]:
    longest = ESCAPE_BYTES * max_document_bytes + LINE_ROOM_BYTES
    number = 0
    while line := stream.readline(longest + 1):
        number += 1
        place = f"{file.name}:{number}"
        if len(line) > longest or _count_text_bytes(line) > max_document_bytes + LINE_ROOM_BYTES:
            _skip_line(stream, line)
            yield Document(place, _domain_of(file), "", _too_long("line", max_document_bytes))
        elif line.strip():
            yield _parse_line(file, place, line)
        else:
            number += _skip_blank_lines(stream)


def _skip_blank_lines(stream: Any) -> int:
    """Skip whitespace, a buffer at a time, and count its line ends: a file may hold gigabytes."""
    line_ends = 0
    while data := stream.peek():
        num_bytes = len(data) - len(data.lstrip())
        line_ends += data.count(b"\n", 0, num_bytes)
        stream.read(num_bytes)
        if num_bytes < len(data):
            break
    return line_ends


def _count_text_bytes(line: bytes) -> int:
    """Count the bytes of text in a JSON line, each escape as one: a lower bound."""
    return len(line) - line.count(b"\\") - (ESCAPE_BYTES - 2) * line.count(b"\\u")


def _skip_line(stream: Any, line: bytes) -> None:
    """Skip the rest of a line that was read in part, in pieces of bounded size."""
    while line and not line.endswith(b"\n"):
        line = stream.readline(SKIP_BYTES)


def _too_long(what: str, max_document_bytes: int) -> str:
    return f"over-long: {what}, corpus.max_document_bytes is {max_document_bytes}"


def _parse_line(file: InputFile, place: str, line: bytes) -> Document:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Document(place, _domain_of(file), "", f"invalid UTF-8: {error.reason}")
    except RecursionError:
        return Document(place, _domain_of(file), "", "no JSON object: nested too deep")
    except json.JSONDecodeError as error:
        reason = f"no JSON object: {error.msg} at character {error.pos + 1} of the line"
        return Document(place, _domain_of(file), "", reason)
    except ValueError as error:
        return Document(place, _domain_of(file), "", f"no JSON object: {_shorten(error)}")
    return _make_document(file, place, record)


def _make_document(file: InputFile, place: str, record: object) -> Document:
    if not isinstance(record, dict):
        return Document(place, _domain_of(file), "", "no JSON object: another JSON value")
    record = cast(dict[str, Any], record)
    try:
        doc_id = _read_name(record, "id") or place
        domain = _domain_of(file, _read_name(record, "domain"))
    except ValueError as error:
        return Document(place, _domain_of(file), "", str(error))
    if file.settings.messages is not None:
        return _make_conversation(doc_id, domain, record, file.settings)
    text = record.get(file.settings.text)
    if isinstance(text, bytes):
        return _decode(doc_id, domain, text)
    if not isinstance(text, str):
        return Document(doc_id, domain, "", f"field {file.settings.text!r} holds no text")
    return Document(doc_id, domain, text)


def _make_conversation(
    doc_id: str, domain: str, record: dict[str, Any], settings: DocumentsSettings
) -> Document:
    names = list(settings.list_fields())
    missing = [name for name in names if record.get(name) is None]
    if missing:
        return Document(doc_id, domain, "", f"field {missing[0]!r} holds no messages")
    value = [record[name] for name in names] if len(names) > 1 else record[names[0]]
    try:
        messages = parse_messages(value, settings.thinking)
    except UnicodeDecodeError as error:
        return Document(doc_id, domain, "", f"invalid UTF-8: {error.reason}")
    except ValueError as error:
        return Document(doc_id, domain, "", str(error))
    text = "".join(message.content for message in messages if message.role == "assistant")
    return Document(doc_id, domain, text, messages=messages)


def _read_name(record: dict[str, Any], field: str) -> str:
    """Read a document's own id or domain; empty if it has none.

    Raises:
        ValueError: It cannot be stored, or is too long to be repeated in every row.
    """
    value = record.get(field)
    try:
        value = value.decode("utf-8") if isinstance(value, bytes) else value
        name = str(value) if isinstance(value, str | int) else ""
        name.encode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"invalid UTF-8: field {field!r}") from error
    if len(name) > MAX_NAME_CHARS:
        raise ValueError(
            f"over-long: field {field!r} has {len(name)} characters, of {MAX_NAME_CHARS}"
        )
    return name if name.strip() else ""


def _decode(doc_id: str, domain: str, data: bytes, encoding: str = "utf-8") -> Document:
    try:
        return Document(doc_id, domain, data.decode(encoding))
    except UnicodeDecodeError as error:
        return Document(doc_id, domain, "", f"invalid UTF-8: {error.reason}")


def _read_parquet(file: InputFile, max_document_bytes: int) -> Iterator[Document]:
    name = file.name
    max_page_bytes = max_document_bytes + PAGE_ROOM_BYTES
    number, num_bytes = 0, 0
    with open_input(file.path, file.num_bytes) as stream:
        parquet = open_parquet(stream, buffer_size=BUFFER_BYTES, pre_buffer=False)
        columns = _choose_columns(parquet.schema_arrow, file.settings)
        schema = parquet.schema
        paths = [schema.column(number).path for number in range(len(schema))]
        leaves = [path for path in paths if path in columns or path.split(".")[0] in columns]
        groups = list_chunks(read_footer(stream), paths, parquet.metadata.created_by)
        if len(groups) != parquet.num_row_groups:
            raise ValueError("it has no valid footer")
        for group, chunks in enumerate(groups):
            num_rows = parquet.metadata.row_group(group).num_rows
            page_bytes = find_largest_page(stream, chunks, leaves)
            if page_bytes > max_page_bytes:
                place = f"{name}:{number + 1}-{number + num_rows}"
                what = f"{num_rows} rows not read, a page has {page_bytes} bytes"
                fault = _too_long(what, max_document_bytes)
                yield Document(place, _domain_of(file), "", fault, num_documents=num_rows)
                number += num_rows
                continue
            # No cell is larger than its page, but a dictionary entry may be repeated in every row.
            batch_size = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // max(page_bytes, 1)))
            for batch in parquet.iter_batches(batch_size, row_groups=[group], columns=columns):
                num_bytes += batch.nbytes
                if num_bytes > max_text_bytes(file.num_bytes):
                    raise ValueError(f"it unpacks to over {MAX_EXPANSION} times its size")
                for record in _to_records(batch):
                    number += 1
                    yield _make_document(file, f"{name}:{number}", record)


def _choose_columns(schema: pa.Schema, settings: DocumentsSettings) -> list[str]:
    """Choose the columns to read: text, and id and domain if they hold text or integers."""
    wanted = settings.list_fields()
    for name in wanted:
        if name not in schema.names:
            raise ValueError(f"it has no column {name!r}, only {', '.join(schema.names)}")
        if settings.messages is None and not _holds_text(schema.field(name).type):
            raise ValueError(f"its column {name!r} holds {schema.field(name).type}, not text")
    names = {
        name
        for name in ("id", "domain")
        if name in schema.names
        and (_holds_text(kind := schema.field(name).type) or pa.types.is_integer(kind))
    }
    return sorted(names | set(wanted))


def _holds_text(kind: pa.DataType) -> bool:
    return any(
        is_kind(kind)
        for is_kind in (pa.types.is_string, pa.types.is_binary, pa.types.is_fixed_size_binary)
    )


def _to_records(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Convert a batch to records, strings as bytes: Arrow does not check that they are UTF-8."""
    columns = [
        column.view(pa.binary()) if pa.types.is_string(column.type) else column
        for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names).to_pylist()


def _read_text(file: InputFile, max_document_bytes: int) -> Iterator[Document]:
    if file.settings.messages is not None:
        yield Document(file.name, _domain_of(file), "", "no messages: a text file has no fields")
        return
    with open_input(file.path, file.num_bytes) as stream:
        data = stream.read(max_document_bytes + 1)
    if len(data) > max_document_bytes:
        yield Document(file.name, _domain_of(file), "", _too_long("file", max_document_bytes))
    else:
        yield _decode(file.name, _domain_of(file), data, "utf-8-sig")


def _read_dataset(file: InputFile, max_document_bytes: int) -> Iterator[Document]:
    del max_document_bytes  # the library has the records in memory or mapped already
    for number, record in enumerate(_load_dataset(file.path, file.settings.split), 1):
        yield _make_document(file, f"{file.name}:{number}", record)


def _load_dataset(path: str, split: str) -> Any:
    """Load a data set; one that cannot be loaded is the user's choice, not a stranger's bad file.

    Raises:
        UserError: It cannot be loaded.
    """
    import datasets

    def explain(error: Exception) -> UserError:
        return UserError(
            f"the data set {path!r}, split {split!r}, cannot be loaded: {_shorten(error)}; check "
            "path and split of the documents, or save them as JSON Lines or Parquet"
        )

    with user_error_from(explain):
        if is_saved_dataset(path):
            loaded = datasets.load_from_disk(path)
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(path, split=split)


def _domain_of(file: InputFile, named: str = "") -> str:
    return named if file.settings.domain is None else file.settings.domain
