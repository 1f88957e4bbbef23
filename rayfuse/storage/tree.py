"""All files below a folder, at any depth, without following links."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

TIME_KEYS = ("LastModified", "mtime", "last_modified", "updated")
"""Where clients of object storage put the time of an object's last change."""


@dataclass(frozen=True)
class Tree:
    """The files below a folder."""

    sizes: dict[str, int]
    """Bytes of each file, by its name below the folder."""
    changed_at: float | None
    """When the newest file was written, in seconds since 1970; None if that is unknown or there is
    no file."""
    links: tuple[str, ...] = ()
    """Names below the folder that are links, and are not followed; empty for the folder itself."""


def walk_local(path: Path) -> Tree:
    """List a folder of a local disk; one that does not exist has no files."""
    if path.is_symlink():
        return Tree({}, None, ("",))
    sizes: dict[str, int] = {}
    links: list[str] = []
    newest: float | None = None
    for folder, folders, files in os.walk(path):
        inner = Path(folder).relative_to(path)
        links += [(inner / name).as_posix() for name in folders if Path(folder, name).is_symlink()]
        for name in files:
            file, below = Path(folder, name), (inner / name).as_posix()
            try:
                status = file.lstat()
            except FileNotFoundError:  # removed since the folder was listed
                continue
            if file.is_symlink():
                links.append(below)
                continue
            sizes[below] = status.st_size
            newest = max(newest or 0.0, status.st_mtime)
    return Tree(sizes, newest, tuple(links))


def build_tree(root: str, entries: Mapping[str, Mapping[str, Any]]) -> Tree:
    """Build the tree of a prefix in object storage.

    Names that end in `/` are no files: consoles and other clients make such empty objects to show a
    folder.

    Args:
        root: The prefix, as the client spells it.
        entries: What the client lists below it, by name.
    """
    files = {
        name: entry
        for name, entry in entries.items()
        if entry["type"] == "file" and not name.endswith("/")
    }
    times = [_read_time(entry) for entry in files.values()]
    known = [time for time in times if time is not None]
    return Tree(
        {name.removeprefix(f"{root}/"): int(entry["size"] or 0) for name, entry in files.items()},
        max(known) if known and len(known) == len(times) else None,
    )


def _read_time(entry: Mapping[str, Any]) -> float | None:
    found = next((entry[key] for key in TIME_KEYS if entry.get(key) is not None), None)
    if isinstance(found, datetime):
        return found.timestamp()
    return float(found) if isinstance(found, int | float) else None
