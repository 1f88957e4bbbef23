"""Checkpoints in the store: uploaded while training goes on, used only when whole.

A checkpoint is a folder of the files that all workers wrote. Each worker's record of its files,
with their sha256, comes last; with every worker's record there, the checkpoint is whole.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rayfuse.runtime.logging import log_event
from rayfuse.storage.store import Store

BEGUN = "begun"
RECORD_FILE = re.compile(rf"(step_\d+-\w+)-(?:\d+|{BEGUN})\.json")
BLOCK_BYTES = 2**22


@dataclass(frozen=True)
class Record:
    """What one worker put into a checkpoint."""

    name: str
    """Of the checkpoint: its step, and an id of the attempt."""
    step: int
    num_workers: int
    files: dict[str, str]
    """sha256 by name."""
    bits_per_byte: float | None
    """On validation, where it was measured last."""


class Checkpoints:
    """The checkpoints of one training."""

    def __init__(self, store: Store, folder: str) -> None:
        """Name the place; nothing is written yet.

        Args:
            store: Where all is kept.
            folder: The training's own, below the store's root.
        """
        self.store, self.folder = store, f"{folder}/checkpoints"
        self.uploader = ThreadPoolExecutor(max_workers=1)
        self.uploading: Future[None] | None = None

    def list_complete(self) -> dict[str, list[Record]]:
        """Return every worker's record of each whole checkpoint, by its name, oldest first."""
        found: dict[str, list[Record]] = {}
        for file, name in self._list_records().items():
            record = self._read_record(file)
            if record is not None and record.name == name:
                found.setdefault(name, []).append(record)
        return {name: each for name, each in found.items() if len(each) == each[0].num_workers}

    def list_incomplete(self) -> list[str]:
        """Return the names of the checkpoints that were begun and are not whole."""
        return sorted(set(self._list_records().values()) - set(self.list_complete()))

    def _list_records(self) -> dict[str, str]:
        """Return which checkpoint each file is of, by its name; foreign files are left out."""
        files = sorted(self.store.sizes(f"{self.folder}/records"))
        return {file: found[1] for file in files if (found := RECORD_FILE.fullmatch(file))}

    def _read_record(self, file: str) -> Record | None:
        """Return a worker's record; None for one that is damaged, gone, or of the beginning."""
        try:
            return Record(**json.loads(self.store.read(f"{self.folder}/records/{file}")))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def begin(self, name: str) -> None:
        """Note that a checkpoint is about to be made; one worker says so."""
        self.store.write(f"{self.folder}/records/{name}-{BEGUN}.json", b"{}")

    def upload(self, local: tempfile.TemporaryDirectory[str], record: Record, rank: int) -> None:
        """Begin to upload a worker's files and then its record; the one before is waited for.

        Args:
            local: The folder with the files, deleted in the end.
            record: Without the files.
            rank: The worker's.

        Raises:
            StorageUnavailableError: The upload before this one has failed.
        """
        self.wait()
        self.uploading = self.uploader.submit(self._upload, local, record, rank)

    def wait(self) -> None:
        """Wait until all is uploaded.

        Raises:
            StorageUnavailableError: It could not be.
        """
        if self.uploading is not None:
            self.uploading.result()
            self.uploading = None

    def download(self, records: list[Record], folder: Path) -> bool:
        """Bring a checkpoint's files into a folder, and return whether they are as recorded."""
        for record in records:
            for name, digest in record.files.items():
                path = (folder / name).resolve()
                if not path.is_relative_to(folder.resolve()):
                    return False
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self.store.download(f"{self.folder}/{record.name}/{name}", str(path))
                except FileNotFoundError:
                    return False
                if hash_file(path) != digest:
                    return False
        return True

    def retain(self, keep: int) -> None:
        """Delete all but the newest whole checkpoints and the one with the best validation."""
        whole = self.list_complete()
        names = list(whole)
        kept = {*names[-keep:]}
        measured = [name for name in names if whole[name][0].bits_per_byte is not None]
        if measured:
            kept.add(min(measured, key=lambda name: whole[name][0].bits_per_byte or 0.0))
        gone = [name for name in names if name not in kept]
        # One that was cut off is older than a whole one; what is being made is newer.
        gone += [name for name in self.list_incomplete() if names and name < names[-1]]
        for name in gone:
            self._remove(name)

    def _remove(self, name: str) -> None:
        records = f"{self.folder}/records"
        for file in self.store.sizes(records, prefix=f"{name}-"):  # first, so that none is half
            self.store.remove(f"{records}/{file}")
        for folder in (f"{self.folder}/{name}", f"{self.folder}/{name}/ds"):
            for file in self.store.sizes(folder):
                self.store.remove(f"{folder}/{file}")

    def _upload(self, local: tempfile.TemporaryDirectory[str], record: Record, rank: int) -> None:
        with local as folder:
            files: dict[str, str] = {}
            for path in list_files(Path(folder)):
                name = path.relative_to(folder).as_posix()
                files[name] = hash_file(path)
                self.store.upload(str(path), f"{self.folder}/{record.name}/{name}")
        content = json.dumps(asdict(record) | {"files": files}).encode()
        self.store.write(f"{self.folder}/records/{record.name}-{rank}.json", content)
        log_event(
            "checkpoint whole",
            run=self.store.root,
            stage="train",
            folder=self.folder,
            checkpoint=record.name,
            worker=rank,
        )


def name_checkpoint(step: int, attempt: str) -> str:
    """Return a checkpoint's name; names sort by step."""
    return f"step_{step:08d}-{attempt}"


def list_files(folder: Path) -> Iterator[Path]:
    """Return all files below a folder, sorted."""
    return (Path(at, name) for at, _, names in sorted(os.walk(folder)) for name in sorted(names))


def hash_file(path: Path) -> str:
    """Return a file's sha256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
