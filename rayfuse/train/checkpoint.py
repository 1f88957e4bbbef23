"""Checkpoints in the store: uploaded while training continues, used only when complete.

A checkpoint is a folder of the files that all workers wrote. Object storage has no rename, so the
commit is a record per worker: it lists the worker's files with their sha256 and is written after
them. A checkpoint is complete once the records of all its workers are there.
"""

import math
import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rayfuse.runtime.logging import log_event
from rayfuse.storage.seal import ShardError, seal, unseal
from rayfuse.storage.store import Store, hash_file

STARTED = "begun"
"""Stands for the rank in the name of the file that marks a checkpoint as started."""

RECORD_FILE = re.compile(rf"(step_\d+-\w+)-(\d+|{STARTED})\.json")

FILE = re.compile(r"metrics\.jsonl|zero_to_\w{1,30}\.py|ds/\w[\w.-]{0,200}\.pt")
"""The names of a checkpoint's files: DeepSpeed's states, its scripts, and the metrics."""


@dataclass(frozen=True)
class CheckpointRecord:
    """One worker's part of a checkpoint."""

    name: str
    """The checkpoint's: its step, and an id of the attempt."""
    step: int
    num_workers: int
    rank: int
    """The worker's."""
    files: dict[str, str]
    """sha256 by name."""
    bits_per_byte: float | None
    """The last validation before it."""
    inputs: dict[str, str]
    """What the run is trained on: see `run.made_models.read_inputs`."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, store: Store, folder: str) -> None:
        """Name the place; nothing is written yet.

        Args:
            store: The run's storage.
            folder: The run's folder below the store's root.
        """
        self.store, self.folder = store, f"{folder}/checkpoints"
        self.uploader = ThreadPoolExecutor(max_workers=1)
        self.uploading: Future[None] | None = None

    def list_complete(self) -> dict[str, list[CheckpointRecord]]:
        """Return every worker's record of each complete checkpoint, by its name, oldest first."""
        found: dict[str, list[CheckpointRecord]] = {}
        for file, name in self._list_records().items():
            record = self._read_record(file)
            if record is not None and file == f"{record.name}-{record.rank}.json":
                found.setdefault(name, []).append(record)
        return {
            name: sorted(records, key=lambda record: record.rank)
            for name, records in found.items()
            if sorted(record.rank for record in records) == list(range(records[0].num_workers))
        }

    def list_incomplete(self) -> list[str]:
        """Return the names of the checkpoints that were started and are not complete."""
        return sorted(set(self._list_records().values()) - set(self.list_complete()))

    def _list_records(self) -> dict[str, str]:
        """Return the checkpoint of each record file, by the file's name; ignore foreign files."""
        files = sorted(self.store.sizes(f"{self.folder}/records"))
        return {file: found[1] for file in files if (found := RECORD_FILE.fullmatch(file))}

    def _read_record(self, file: str) -> CheckpointRecord | None:
        """Return a worker's record; None for a start mark, or a file that is corrupt or gone."""
        name = f"{self.folder}/records/{file}"
        try:
            record = CheckpointRecord(**unseal(self.store.read(name), name))
            is_ours = all(FILE.fullmatch(file) for file in record.files)
        except (FileNotFoundError, ShardError, TypeError):
            return None
        return record if is_ours else None

    def mark_started(self, name: str) -> None:
        """Mark a checkpoint as started, so that an incomplete one is known; one worker calls."""
        self.store.write(f"{self.folder}/records/{name}-{STARTED}.json", b"{}")

    def upload(self, local: tempfile.TemporaryDirectory[str], record: CheckpointRecord) -> None:
        """Start to upload a worker's files and then its record, in the background.

        Waits for the previous upload first: two would need twice the local disk.

        Args:
            local: The folder with the files; it is deleted in the end.
            record: The worker's record, still without the files.

        Raises:
            StorageUnavailableError: The previous upload has failed.
        """
        self.wait()
        self.uploading = self.uploader.submit(self._upload, local, record)

    def wait(self) -> None:
        """Wait for the upload that was started last.

        Raises:
            StorageUnavailableError: It has failed.
        """
        if self.uploading is not None:
            self.uploading.result()
            self.uploading = None

    def download(self, records: list[CheckpointRecord], folder: Path) -> bool:
        """Download a checkpoint's files to a folder, and check them against their records.

        Returns:
            False if a file is missing, differs from its record, or is none of a checkpoint.
        """
        for record in records:
            for name, digest in record.files.items():
                if not FILE.fullmatch(name):
                    return False
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self.store.download(f"{self.folder}/{record.name}/{name}", str(path))
                except FileNotFoundError:
                    return False
                if hash_file(path) != digest:
                    return False
        return True

    def retain(self, num_newest: int, best_step: int | None = None) -> None:
        """Delete all but the newest complete checkpoints and those with the best validation.

        Args:
            num_newest: How many of the newest to keep.
            best_step: The step with the best validation of this run, kept beside the checkpoint
                whose record has the best one: that may be corrupt, or the run's may still be
                uploading.
        """
        complete = self.list_complete()
        names = list(complete)
        kept = {*names[-num_newest:]}
        kept |= {name for name in names if complete[name][0].step == best_step}
        measured = [name for name in names if complete[name][0].bits_per_byte is not None]
        if measured:
            kept.add(
                min(measured, key=lambda name: rank_bits(complete[name][0].bits_per_byte or 0))
            )
        removed = [name for name in names if name not in kept]
        # An incomplete checkpoint that is newer than every complete one may still be uploading.
        removed += [name for name in self.list_incomplete() if names and name < names[-1]]
        for name in removed:
            self._remove(name)

    def remove_stale(self, inputs: dict[str, str]) -> int:
        """Delete the checkpoints of other training data, and return their number.

        Args:
            inputs: What the run is trained on now.
        """
        stale = [
            name
            for name, records in self.list_complete().items()
            if any(inputs.get(key, value) != value for key, value in records[0].inputs.items())
        ]
        for name in stale:
            self._remove(name)
        return len(stale)

    def _remove(self, name: str) -> None:
        # The records go first: if this stops in between, files without a record are left over,
        # never a record that promises files which are gone.
        records = f"{self.folder}/records"
        for file in self.store.sizes(records, prefix=f"{name}-"):
            self.store.remove(f"{records}/{file}")
        for folder in (f"{self.folder}/{name}", f"{self.folder}/{name}/ds"):
            for file in self.store.sizes(folder):
                self.store.remove(f"{folder}/{file}")

    def _upload(self, local: tempfile.TemporaryDirectory[str], record: CheckpointRecord) -> None:
        with local as folder:
            files: dict[str, str] = {}
            for path in list_files(Path(folder)):
                name = path.relative_to(folder).as_posix()
                files[name] = hash_file(path)
                self.store.upload(str(path), f"{self.folder}/{record.name}/{name}")
        # The commit: a worker killed before this line leaves the checkpoint incomplete.
        content = seal(asdict(record) | {"files": files})
        self.store.write(f"{self.folder}/records/{record.name}-{record.rank}.json", content)
        log_event(
            "checkpoint complete",
            run=self.store.root,
            stage="train",
            folder=self.folder,
            checkpoint=record.name,
            worker=record.rank,
        )


def rank_bits(bits_per_byte: float) -> tuple[bool, float]:
    """Rank validations, the best first; one that is not finite comes after all others."""
    is_finite = math.isfinite(bits_per_byte)
    return not is_finite, bits_per_byte if is_finite else 0.0


def name_checkpoint(step: int, attempt: str) -> str:
    """Return a checkpoint's name; names sort by step."""
    return f"step_{step:08d}-{attempt}"


def list_files(folder: Path) -> Iterator[Path]:
    """Return all files below a folder, sorted."""
    return (Path(at, name) for at, _, names in sorted(os.walk(folder)) for name in sorted(names))
