"""List the files of documents, open them, and detect that one has changed since."""

import glob
import gzip
import io
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, cast

import fsspec
import zstandard

from rayfuse.config.base import UserError, first_line
from rayfuse.config.corpus import DocumentsSettings

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

BUFFER_BYTES = 1 << 20

VERSION_KEYS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
"""Keys in a file system's records whose value changes when the file does, the most exact first."""


@dataclass(frozen=True)
class InputFile:
    """One file of documents, or one Hugging Face data set."""

    path: str
    format: Format
    num_bytes: int
    """Size as stored; 0 for a data set on the hub."""
    version: str
    """Changes when the file does: modification time, ETag or revision."""
    settings: DocumentsSettings

    @property
    def is_packed(self) -> bool:
        """Whether the file is compressed, so that its size does not give the length of the text."""
        return self.format in ("parquet", "dataset") or self.path.endswith(PACKED_SUFFIXES)


def list_inputs(settings: DocumentsSettings, setting: str) -> list[InputFile]:
    """List the files of one entry of a `documents` setting, sorted by path.

    Args:
        settings: One entry of `documents`.
        setting: Its name in the recipe, for errors.

    Raises:
        UserError: There are no files, or the format of a file is not clear from its name.
    """
    if settings.format == "dataset" or is_saved_dataset(settings.path):
        return [InputFile(settings.path, "dataset", 0, _version_of_dataset(settings), settings)]
    found = _list_uri(settings.path) if "://" in settings.path else _list_local(settings.path)
    inputs: list[InputFile] = []
    for path, num_bytes, version in sorted(found):
        kind = settings.format if settings.format != "auto" else _format_of(path)
        if kind is None and path == settings.path:
            raise UserError(
                f"{setting} is {path!r}, a name without a known format; "
                "set format: jsonl, parquet, text or dataset"
            )
        if kind is not None:
            inputs.append(InputFile(path, cast(Format, kind), num_bytes, version, settings))
    if not inputs:
        raise UserError(
            f"{setting} is {settings.path!r}, where no documents were found; give an existing "
            "file, folder or pattern (.jsonl, .parquet, .txt, also .gz and .zst), or write "
            "format: dataset for a data set of the hub"
        )
    return inputs


def check_unchanged(file: InputFile) -> None:
    """Check that a file is the one that was listed.

    Raises:
        UserError: The file has changed or is missing.
        OSError: The storage cannot be reached.
    """
    remedy = (
        "start the run again: changed documents make a new corpus, data of other corpora is kept"
    )
    if not file.num_bytes and not file.version:  # the listing had no information to compare
        return
    try:
        num_bytes, version = _look_up(file)
    except FileNotFoundError as error:
        raise UserError(
            f"documents {file.path} are missing since the run began; {remedy}"
        ) from error
    if (num_bytes, version) != (file.num_bytes, file.version):
        raise UserError(
            f"documents {file.path} have changed since the run began ({num_bytes} bytes of version "
            f"{version}, not {file.num_bytes} of {file.version}); {remedy}"
        )


def _look_up(file: InputFile) -> tuple[int, str]:
    """Look up the current size and version of a file."""
    if file.format == "dataset":
        return 0, _version_of_dataset(file.settings)
    if "://" not in file.path:
        stat = Path(file.path).stat()
        return stat.st_size, str(stat.st_mtime_ns)
    fs, path = fsspec.url_to_fs(file.path)
    fs.invalidate_cache()
    key = file.version.partition("=")[0]  # compare under the key that the listing had
    return _describe(fs.info(path), (key,))


def is_saved_dataset(path: str) -> bool:
    """Recognise a folder written by `save_to_disk` of Hugging Face's datasets."""
    folder = Path(path)
    return (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()


def _version_of_dataset(settings: DocumentsSettings) -> str:
    """Name the version of a data set: its files' times, or for the hub only the split."""
    if not is_saved_dataset(settings.path):
        return settings.split
    files = sorted(Path(settings.path).rglob("*"))
    return ",".join(f"{file.name}:{file.stat().st_mtime_ns}" for file in files if file.is_file())


def _format_of(path: str) -> Format | None:
    """Look up the format of a file by its suffix, before .gz or .zst; None if unknown."""
    name = posixpath.basename(path)
    for suffix in PACKED_SUFFIXES:
        name = name.removesuffix(suffix)
    return SUFFIXES.get(posixpath.splitext(name)[1].lower())


def _list_local(path: str) -> list[tuple[str, int, str]]:
    """List path, size and version of the local files below a folder or matching a pattern.

    Links to files are followed (a folder of the hub's cache contains only links), links to folders
    are not.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        found = list(local.rglob("*"))
    elif local.is_file():
        found = [local]
    else:
        root = Path(local.anchor or ".")
        pattern = str(local.relative_to(local.anchor)) if local.anchor else str(local)
        try:
            found = list(root.glob(pattern))
        except ValueError as error:
            raise UserError(f"{path!r} is no valid pattern for documents: {error}") from error
    for file in found:
        if file.is_symlink() and not file.exists() and _format_of(str(file)):
            raise UserError(f"documents {file} are a broken link; restore its file or remove it")
    stats = ((str(file), file.stat()) for file in found if file.is_file())
    return [(name, stat.st_size, str(stat.st_mtime_ns)) for name, stat in stats]


def _list_uri(uri: str) -> list[tuple[str, int, str]]:
    """List path, size and version of the files below a URI or matching a pattern."""
    try:
        fs, path = fsspec.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise UserError(f"documents {uri!r} cannot be opened: {first_line(error)}") from error
    fs.invalidate_cache()
    protocol = uri.partition("://")[0]
    listing = fs.glob if glob.has_magic(path) else fs.find
    found = cast(dict[str, Any], listing(path, detail=True))
    return [
        (f"{protocol}://{name}", *_describe(info))
        for name, info in found.items()
        if info["type"] == "file"
    ]


def _describe(info: dict[str, Any], keys: tuple[str, ...] = VERSION_KEYS) -> tuple[int, str]:
    """Extract size and version, the latter as KEY=VALUE, from a file system's record of a file."""
    versions = (f"{key}={_to_plain(info[key])}" for key in keys if info.get(key))
    return info["size"] or 0, next(versions, "")


def _to_plain(version: object) -> object:
    return version.timestamp() if isinstance(version, datetime) else version


@contextmanager
def open_input(path: str) -> Iterator[Any]:
    """Open a local file or URI as bytes, decompressed if its name ends in .gz or .zst."""
    with _open_raw(path) as raw:
        if path.endswith(".gz"):
            with gzip.open(raw, "rb") as stream:
                yield stream
        elif path.endswith(".zst"):
            unpacked: Any = zstandard.ZstdDecompressor().stream_reader(
                raw, read_across_frames=True, closefd=False
            )
            with io.BufferedReader(unpacked, BUFFER_BYTES) as stream:
                yield stream
        else:
            yield raw


def _open_raw(path: str) -> Any:
    if "://" not in path:
        return open(path, "rb", BUFFER_BYTES)
    fs, name = fsspec.url_to_fs(path)
    # The buffer adds `readline(size)`: fsspec's own files read lines of any length.
    return io.BufferedReader(fs.open(name, "rb"), BUFFER_BYTES)
