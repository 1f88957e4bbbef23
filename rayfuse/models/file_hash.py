"""The hash of a file: of all its bytes, and computed one time for a large file.

A cache in the user's folder stores the hash of each large file beside the file's size, its inode
and its times of modification and status change; the latter cannot be set by programs. A file that
differs in one of them is hashed again.
"""

import hashlib
import json
import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path

MIN_CACHED_BYTES = 64 * 2**20
"""Smaller files are hashed each time: that takes less than a second."""

CHUNK_BYTES = 8 * 2**20

logger = logging.getLogger(__name__)


def hash_file(path: Path) -> str:
    """Hash a file's size and content (SHA-256), as 64 hexadecimal digits."""
    state = _describe(path)
    if state["size"] < MIN_CACHED_BYTES:
        return _hash_content(path)
    cached = _find_cached(path)
    if cached is not None:
        with suppress(OSError, ValueError):
            record = json.loads(cached.read_bytes())
            if isinstance(record, dict) and record.get("state") == state:
                return str(record["hash"])
    digest = _hash_content(path)
    if cached is not None and _describe(path) == state:
        _write_cached(cached, {"path": str(path), "state": state, "hash": digest})
    return digest


def find_cache_folder() -> Path | None:
    """Find the folder of rayfuse's caches; None for a user without a home folder."""
    given = os.environ.get("XDG_CACHE_HOME")
    with suppress(RuntimeError):  # there is no home folder
        return Path(given) / "rayfuse" if given else Path.home() / ".cache" / "rayfuse"
    return None


def _describe(path: Path) -> dict[str, int]:
    state = path.stat()
    return {
        "size": state.st_size,
        "inode": state.st_ino,
        "modified_ns": state.st_mtime_ns,
        "changed_ns": state.st_ctime_ns,
    }


def _hash_content(path: Path) -> str:
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _find_cached(path: Path) -> Path | None:
    folder = find_cache_folder()
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return None if folder is None else folder / "hashes" / f"{name}.json"


def _write_cached(cached: Path, record: dict[str, object]) -> None:
    """Write a cache entry atomically; one that cannot be written costs only time."""
    try:
        cached.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=cached.parent, delete=False) as file:
            json.dump(record, file)
        os.replace(file.name, cached)
    except OSError as error:
        logger.info("the hash of %s is not cached: %s", record["path"], error)
