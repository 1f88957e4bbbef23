"""List the files of documents, and detect that one has changed since."""

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, cast

import fsspec

from rayfuse.config.base import UserError, first_line
from rayfuse.config.corpus import Documents, DocumentsSettings
from rayfuse.run.open_input import UNPACKERS, split_name
from rayfuse.storage.retry import check_access

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

HIDDEN_MARKS = (".", "_")
"""How names of files and folders begin that tools keep for themselves."""

ABOUT_FILES = (
    *("readme", "license", "licence", "notice", "citation", "changelog", "contributing"),
    *("code_of_conduct", "dataset_infos", "dataset_info", "dataset_dict"),
)
"""Names, without suffix and in lower case, of files that are about the data beside them."""

SPLIT_WORDS: dict[str, str] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in names by which the hub recognises the split that a file belongs to."""

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
    name: str
    """Its path below what the recipe names: documents without an id are named by it and by their
    place in it. Unique within a `documents` setting."""

    @property
    def is_packed(self) -> bool:
        """Whether the file is compressed, so that its size does not give the length of the text."""
        return self.format in ("parquet", "dataset") or split_name(self.path)[2] != ""


@dataclass(frozen=True)
class InputList:
    """The files of one entry of a `documents` setting, sorted by path."""

    files: list[InputFile]
    skipped: Mapping[str, int] = field(default_factory=Counter[str])
    """How many files of a folder were not taken, by the reason."""


@dataclass(frozen=True)
class _Found:
    """A file as a file system lists it."""

    path: str
    name: str
    """Below the folder, or below the fixed part of the pattern."""
    num_bytes: int
    version: str


@dataclass(frozen=True)
class _Listing:
    """What a path of the recipe names."""

    kind: Literal["file", "folder", "pattern"]
    root: str
    """The folder, the fixed part of the pattern, or the folder of the file."""
    files: list[_Found]


def list_documents(documents: Documents, setting: str) -> list[InputList]:
    """List the files of each entry of a `documents` setting; none has no files.

    Args:
        documents: The setting.
        setting: Its name in the recipe, for errors.

    Raises:
        UserError: As for `list_inputs`.
    """
    names: set[str] = set()
    lists: list[InputList] = []
    for number, entry in enumerate(documents, 1):
        found = list_inputs(entry, setting)
        prefix = ""
        while any(prefix + file.name in names for file in found.files):
            prefix += f"{number}/"  # the same name in two entries: two documents, so two ids
        files = [replace(file, name=prefix + file.name) for file in found.files]
        names.update(file.name for file in files)
        lists.append(replace(found, files=files))
    return lists


def list_inputs(settings: DocumentsSettings, setting: str) -> InputList:
    """List the files of one entry of a `documents` setting.

    Of a folder, names that begin with `.` or `_`, files about the data (README, LICENSE) and files
    of unknown formats are skipped.

    Args:
        settings: The entry.
        setting: The setting's name in the recipe, for errors.

    Raises:
        UserError: There are no files, the format of a file is not clear from its name, a folder has
            files of several splits or a link that leads out of it, or a data set lacks the split.
    """
    path = os.path.expanduser(settings.path)
    if settings.format == "dataset" or is_saved_dataset(path):
        return InputList([_describe_dataset(path, settings, setting)])
    listing = _list_uri(path) if "://" in path else _list_local(path)
    files, skipped = _skip_files(settings, listing, path)
    if not files and listing.kind == "file":
        raise UserError(
            f"{setting} is {path!r}, a name without a known format; "
            "set format: jsonl, parquet, text or dataset"
        )
    if not files:
        raise UserError(
            f"{setting} is {path!r}, where no documents were found{_list_causes(skipped)}; give an "
            "existing file, folder or pattern (.jsonl, .parquet, .txt, also compressed: "
            f"{', '.join(UNPACKERS)}), or write format: dataset for a data set of the hub"
        )
    if listing.kind != "file" and "://" not in path:
        _check_links(files, listing.root)
    if listing.kind == "folder":
        _check_splits(files, path, setting)
    return InputList(sorted(files, key=lambda file: file.path), skipped)


def _skip_files(
    settings: DocumentsSettings, listing: _Listing, path: str
) -> tuple[list[InputFile], Counter[str]]:
    """Divide files into those to read and, by the reason, the number of those to skip."""
    kept: list[InputFile] = []
    skipped: Counter[str] = Counter()
    named = path.split("/") if listing.kind == "pattern" else []
    marks = tuple(mark for mark in HIDDEN_MARKS if not any(n.startswith(mark) for n in named))
    for file in listing.files:
        kind = settings.format if settings.format != "auto" else _format_of(file.path)
        parts = file.name.split("/") if listing.kind != "file" else []
        if any(part.startswith(marks) for part in parts):
            skipped["hidden"] += 1
        elif listing.kind == "folder" and split_name(file.path)[0] in ABOUT_FILES:
            skipped["about the data"] += 1
        elif kind is None:
            skipped["of other kinds"] += 1
        else:
            kind = cast(Format, kind)
            kept.append(
                InputFile(file.path, kind, file.num_bytes, file.version, settings, file.name)
            )
    return kept, skipped


def _list_causes(skipped: Mapping[str, int]) -> str:
    causes = ", ".join(f"{count} {cause}" for cause, count in skipped.items())
    return f" (skipped: {causes})" if causes else ""


def _check_links(files: Sequence[InputFile], root: str) -> None:
    """Check that no file of a local folder or pattern is stored outside its root.

    A folder from elsewhere may hold a link to any file of this computer. The snapshots in a cache
    of the hub are links to the blobs beside them.
    """
    allowed = Path(root).resolve()
    for number, part in enumerate(allowed.parts):
        if part == "snapshots" and Path(*allowed.parts[:number], "blobs").is_dir():
            allowed = Path(*allowed.parts[:number])
            break
    folders: dict[Path, Path] = {}
    for file in files:
        local = Path(file.path)
        if local.parent not in folders:
            folders[local.parent] = local.parent.resolve()
        stored = local.resolve() if local.is_symlink() else folders[local.parent] / local.name
        if not stored.is_relative_to(allowed):
            raise UserError(
                f"documents {file.path} are a link out of {root}, to {stored}; remove the link, or "
                "give the path of its file in the recipe"
            )


def _check_splits(files: Sequence[InputFile], path: str, setting: str) -> None:
    """Check that a folder does not mix splits: text to evaluate on would be learned from."""
    found: dict[str, tuple[str, str]] = {}
    for file in files:
        words = re.findall(r"[A-Za-z]+", file.name) if file.format != "text" else []
        for word in reversed(words):
            split = SPLIT_WORDS.get(word.lower())
            if split is not None:
                found.setdefault(split, (word, file.name))
                break
    if len(found) > 1:
        splits = ", ".join(f"{split} ({name})" for split, (_, name) in sorted(found.items()))
        word, name = found.get("train") or next(iter(found.values()))
        *folders, base = name.split("/")
        example = [*folders, f"*{word}*"] if word in base else folders
        raise UserError(
            f"{setting} is the folder {path!r}, with files of several splits: {splits}; name the "
            f"files to read by a folder or a pattern, such as "
            f"{'/'.join([path.rstrip('/'), *example])}"
        )


def _describe_dataset(path: str, settings: DocumentsSettings, setting: str) -> InputFile:
    """Describe a Hugging Face data set, and check that a saved one has the split."""
    index = Path(path) / "dataset_dict.json"
    if index.is_file():
        try:
            splits = list(json.loads(index.read_text())["splits"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index} is corrupt ({error!r}); save the data set again") from error
        if settings.split not in splits:
            raise UserError(
                f"{setting} is {path!r}, a data set with the splits {', '.join(map(str, splits))}, "
                f"but split is {settings.split!r}; set split: to one of them"
            )
    version = _version_of_dataset(path, settings)
    return InputFile(path, "dataset", 0, version, settings, path)


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
        return 0, _version_of_dataset(file.path, file.settings)
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


def _version_of_dataset(path: str, settings: DocumentsSettings) -> str:
    """Name the version of a data set: its files' times, or for the hub only the split."""
    if not is_saved_dataset(path):
        return settings.split
    files = sorted(Path(path).rglob("*"))
    return ",".join(f"{file.name}:{file.stat().st_mtime_ns}" for file in files if file.is_file())


def _format_of(path: str) -> Format | None:
    """Look up the format of a file by its suffix, before that of its compression."""
    return SUFFIXES.get(split_name(path)[1])


def _fixed_part(path: str) -> str:
    """Cut a pattern before its first part with a wildcard; a path without one stays as it is."""
    parts = path.split("/")
    fixed = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return "/".join(parts[:fixed]) or ("/" if path.startswith("/") else ".")


def _name_below(path: str, root: str) -> str:
    name = os.path.relpath(path, root)
    # File systems allow names that are not Unicode.
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _list_local(path: str) -> _Listing:
    """List the local files that a path names.

    Links to files are followed, links to folders are not.
    """
    local = Path(path)
    if local.is_dir():
        kind, root, found = "folder", path, list(local.rglob("*"))
    elif local.is_file():
        kind, root, found = "file", str(local.parent), [local]
    else:
        start = Path(local.anchor or ".")
        pattern = str(local.relative_to(local.anchor)) if local.anchor else str(local)
        try:
            kind, root, found = "pattern", _fixed_part(path), list(start.glob(pattern))
        except ValueError as error:
            raise UserError(f"{path!r} is no valid pattern for documents: {error}") from error
    for file in found:
        if file.is_symlink() and not file.exists() and _format_of(str(file)):
            raise UserError(f"documents {file} are a broken link; restore its file or remove it")
    stats = ((str(file), file.stat()) for file in found if file.is_file())
    files = [
        _Found(name, _name_below(name, root), stat.st_size, str(stat.st_mtime_ns))
        for name, stat in stats
    ]
    return _Listing(kind, root, files)


def _list_uri(uri: str) -> _Listing:
    """List the files that a URI names."""
    try:
        fs, path = fsspec.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise UserError(f"documents {uri!r} cannot be opened: {first_line(error)}") from error
    fs.invalidate_cache()
    protocol = uri.partition("://")[0]
    is_pattern = glob.has_magic(path)
    listing = fs.glob if is_pattern else fs.find
    try:
        found = cast(dict[str, Any], listing(path, detail=True))
    except Exception as error:  # botocore's errors share no class with others
        check_access(error, f"documents {uri}")
        raise
    kind = "pattern" if is_pattern else "file" if list(found) == [path] else "folder"
    root = os.path.dirname(path) if kind == "file" else _fixed_part(path)
    files = [
        _Found(f"{protocol}://{name}", _name_below(name, root), *_describe(info))
        for name, info in found.items()
        if info["type"] == "file"
    ]
    return _Listing(kind, root, files)


def _describe(info: dict[str, Any], keys: tuple[str, ...] = VERSION_KEYS) -> tuple[int, str]:
    """Extract size and version, the latter as KEY=VALUE, from a file system's record of a file."""
    versions = (f"{key}={_to_plain(info[key])}" for key in keys if info.get(key))
    return info["size"] or 0, next(versions, "")


def _to_plain(version: object) -> object:
    return version.timestamp() if isinstance(version, datetime) else version
