"""Where documents come from: files are listed, opened and read one document at a time."""

import glob
import gzip
import io
import json
import posixpath
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from rayfuse.recipe import DocumentsSettings

Format = Literal["jsonl", "parquet", "text", "dataset"]

SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
}
PACKED_SUFFIXES = (".gz", ".zst")


DAMAGE = (OSError, EOFError, ValueError, pa.ArrowException, zlib.error, zstandard.ZstdError)
"""What readers raise on a file that is not what its name says."""


@dataclass(frozen=True)
class InputFile:
    """One file of documents, or one Hugging Face data set."""

    path: str
    format: Format
    num_bytes: int
    """As stored; 0 for a data set of the hub."""
    version: str
    """Changes when the file does: modification time, ETag or revision."""
    settings: DocumentsSettings

    @property
    def is_packed(self) -> bool:
        """The text is longer than the file by an unknown factor."""
        return self.format in ("parquet", "dataset") or self.path.endswith(PACKED_SUFFIXES)


@dataclass(frozen=True)
class Document:
    """A text with a name; or, with `fault`, what stood in its place and why it is no text."""

    doc_id: str
    domain: str
    text: str
    fault: str | None = None


def list_inputs(settings: DocumentsSettings, setting: str) -> list[InputFile]:
    """Return the files that a recipe's documents stand for, sorted by path.

    Args:
        settings: One entry of `documents`.
        setting: Its name in the recipe, for errors.

    Raises:
        ValueError: There are none, or a file's name does not say what it is.
    """
    if settings.format == "dataset" or _is_saved_dataset(settings.path):
        return [InputFile(settings.path, "dataset", 0, _version_of_dataset(settings), settings)]
    found = _list_uri(settings.path) if "://" in settings.path else _list_local(settings.path)
    inputs: list[InputFile] = []
    for path, num_bytes, version in sorted(found):
        kind = settings.format if settings.format != "auto" else _format_of(path)
        if kind is None and path == settings.path:
            raise ValueError(
                f"{setting} is {path!r}, whose name does not say what it is; "
                "set format: jsonl, parquet, text or dataset"
            )
        if kind is not None:
            inputs.append(InputFile(path, cast(Format, kind), num_bytes, version, settings))
    if not inputs:
        raise ValueError(
            f"{setting} is {settings.path!r}, where no documents were found; give an existing "
            "file, folder or pattern (.jsonl, .parquet, .txt, also .gz and .zst), or write "
            "format: dataset for a data set of the hub"
        )
    return inputs


def read_documents(file: InputFile) -> Iterator[Document]:
    """Yield a file's documents in order; those that are no text have a `fault`.

    A file that cannot be read on yields one last document with the reason: what came before stays.
    """
    readers = {
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
        "text": _read_text,
        "dataset": _read_dataset,
    }
    try:
        yield from readers[file.format](file)
    except DAMAGE as error:
        reason = f"file is no {file.format} file or is damaged: {error}"
        yield Document(file.path, _domain_of(file, None), "", reason)


def _read_jsonl(file: InputFile) -> Iterator[Document]:
    with _open(file.path) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _parse_line(file, f"{posixpath.basename(file.path)}:{number}", line)


def _parse_line(file: InputFile, place: str, line: bytes) -> Document:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Document(place, _domain_of(file, None), "", f"invalid UTF-8: {error.reason}")
    except (ValueError, RecursionError) as error:
        return Document(place, _domain_of(file, None), "", f"no JSON object: {error}")
    if not isinstance(record, dict):
        return Document(place, _domain_of(file, None), "", "no JSON object on the line")
    return _make_document(file, place, cast(dict[str, Any], record))


def _make_document(file: InputFile, place: str, record: dict[str, Any]) -> Document:
    named = record.get("id")
    doc_id = str(named) if isinstance(named, str | int) else place
    domain = _domain_of(file, record.get("domain"))
    text = record.get(file.settings.text)
    if isinstance(text, bytes):
        return _decode(doc_id, domain, text)
    if not isinstance(text, str):
        return Document(doc_id, domain, "", f"field {file.settings.text!r} holds no text")
    return Document(doc_id, domain, text)


def _decode(doc_id: str, domain: str, data: bytes) -> Document:
    try:
        return Document(doc_id, domain, data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Document(doc_id, domain, "", f"invalid UTF-8: {error.reason}")


def _read_parquet(file: InputFile) -> Iterator[Document]:
    name = posixpath.basename(file.path)
    text = file.settings.text
    with _open(file.path) as stream:
        parquet = pq.ParquetFile(stream)
        names = parquet.schema_arrow.names
        if text not in names:
            raise ValueError(f"it has no column {text!r}, only {', '.join(names)}")
        columns = [column for column in (text, "id", "domain") if column in names]
        number = 0
        for batch in parquet.iter_batches(batch_size=256, columns=columns):
            for record in _to_records(batch, text):
                number += 1
                yield _make_document(file, f"{name}:{number}", record)


def _to_records(batch: pa.RecordBatch, text: str) -> list[dict[str, Any]]:
    """Return a batch's rows, texts as bytes: Arrow does not check that strings are UTF-8."""
    index = batch.schema.get_field_index(text)
    column = batch.column(index)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        wide = pa.types.is_large_string(column.type)
        column = column.view(pa.large_binary() if wide else pa.binary())
    return batch.set_column(index, text, column).to_pylist()


def _read_text(file: InputFile) -> Iterator[Document]:
    with _open(file.path) as stream:
        yield _decode(posixpath.basename(file.path), _domain_of(file, None), stream.read())


def _read_dataset(file: InputFile) -> Iterator[Document]:
    for number, record in enumerate(_load_dataset(file.settings), 1):
        yield _make_document(file, f"{file.settings.path}:{number}", cast(dict[str, Any], record))


def _load_dataset(settings: DocumentsSettings) -> Any:
    import datasets

    if _is_saved_dataset(settings.path):
        loaded = datasets.load_from_disk(settings.path)
        return loaded[settings.split] if isinstance(loaded, datasets.DatasetDict) else loaded
    return datasets.load_dataset(settings.path, split=settings.split)


def _is_saved_dataset(path: str) -> bool:
    folder = Path(path)
    return (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()


def _version_of_dataset(settings: DocumentsSettings) -> str:
    if not _is_saved_dataset(settings.path):
        return settings.split
    files = sorted(Path(settings.path).rglob("*"))
    return ",".join(f"{file.name}:{file.stat().st_mtime_ns}" for file in files if file.is_file())


def _domain_of(file: InputFile, named: object) -> str:
    if file.settings.domain is not None:
        return file.settings.domain
    return named if isinstance(named, str) else ""


def _format_of(path: str) -> Format | None:
    name = posixpath.basename(path)
    for suffix in PACKED_SUFFIXES:
        name = name.removesuffix(suffix)
    return SUFFIXES.get(posixpath.splitext(name)[1].lower())


def _list_local(path: str) -> list[tuple[str, int, str]]:
    place = Path(path).expanduser()
    if place.is_dir():
        files = [file for file in place.rglob("*") if file.is_file()]
    elif place.is_file():
        files = [place]
    else:
        root = Path(place.anchor or ".")
        pattern = str(place.relative_to(place.anchor)) if place.anchor else str(place)
        files = [file for file in root.glob(pattern) if file.is_file()]
    stats = ((str(file), file.stat()) for file in files)
    return [(name, stat.st_size, str(stat.st_mtime_ns)) for name, stat in stats]


def _list_uri(uri: str) -> list[tuple[str, int, str]]:
    import fsspec

    fs, path = fsspec.url_to_fs(uri)
    protocol = uri.partition("://")[0]
    listing = fs.glob if glob.has_magic(path) else fs.find
    found = cast(dict[str, Any], listing(path, detail=True))
    return [
        (f"{protocol}://{name}", info["size"] or 0, str(info.get("ETag") or info.get("mtime", "")))
        for name, info in found.items()
        if info["type"] == "file"
    ]


def _open(path: str) -> Any:
    """Open a local file or URI as bytes, unpacked if its name ends in .gz or .zst."""
    if "://" in path:
        import fsspec

        fs, name = fsspec.url_to_fs(path)
        raw: Any = fs.open(name, "rb")
    else:
        raw = open(path, "rb")  # noqa: SIM115 (the caller closes it)
    if path.endswith(".gz"):
        return gzip.open(raw, "rb")
    if path.endswith(".zst"):
        unpacked: Any = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return io.BufferedReader(unpacked)
    return raw
