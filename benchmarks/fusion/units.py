"""Units of work: each is computed once, and stored under a hash of all that decides its result."""

import gzip
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rayfuse.run.fingerprint import fingerprint_of

VERSIONS = {"corpus": 2, "held_out": 2, "captured": 2, "aligned": 4}
"""By kind, by default 1: raised when such a unit computes another result, because of a change in
the study or in rayfuse. All units that depend on it are then computed again."""

KEPT = ("nats", "bytes", "copied")
"""What `save_results` keeps of a record."""

FIRST_NAMES = {"min_edit_distance": "mined", "cooccurrence": "statistics"}
"""Values that were renamed keep their first name in keys, so that stored units stay valid."""


@dataclass(frozen=True)
class Unit:
    """A unit of work: its name, its settings, and the units that it is computed from."""

    kind: str
    name: str
    """For readers; not part of the key."""
    settings: dict[str, Any]
    needs: dict[str, "Unit"] = field(default_factory=dict[str, "Unit"])
    """By role; the order of sources may matter."""

    @cached_property
    def key(self) -> str:
        """Hash everything that decides the result."""
        settings = {
            name: FIRST_NAMES.get(value, value) if isinstance(value, str) else value
            for name, value in self.settings.items()
        }
        return fingerprint_of(
            kind=self.kind,
            settings=settings,
            needs=[[role, unit.key] for role, unit in self.needs.items()],
            version=VERSIONS.get(self.kind, 1),
        )

    def folder(self, out: Path) -> Path:
        """Locate the folder of the result."""
        return out / "units" / f"{self.kind}-{self.key}"

    def is_done(self, out: Path) -> bool:
        """Check that the result is complete: its record is written last."""
        return (self.folder(out) / "result.json").exists()

    def read(self, out: Path) -> dict[str, Any]:
        """Read the record of a unit that is done."""
        return json.loads((self.folder(out) / "result.json").read_bytes())


Work = Callable[[Unit, Path, Path, Path], dict[str, Any]]
"""Computes a unit, given its folder, the study's and the data's, and returns its record."""


def do_unit(unit: Unit, out: Path, data: Path, work: Work) -> dict[str, Any]:
    """Compute a unit, given that its needs are done, and write its record.

    `cpu_seconds` is the process' CPU time, which hardly depends on the load of this machine.
    """
    folder = unit.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    began, cpu_began = time.monotonic(), time.process_time()
    record = work(unit, folder, out, data)
    record |= {
        "kind": unit.kind,
        "name": unit.name,
        "settings": unit.settings,
        "cpu_seconds": time.process_time() - cpu_began,
        "seconds": time.monotonic() - began,
    }
    draft = folder / f"result.json.{os.getpid()}"
    draft.write_text(json.dumps(record))
    draft.replace(folder / "result.json")
    return record


def list_with_needs(units: Iterable[Unit], done_in: Path | None = None) -> list[Unit]:
    """List units and all their needs, each once and after its own needs (topological order).

    Args:
        units: The units.
        done_in: The study's folder, to skip the units that are done there and what only these need.
    """
    found: dict[str, Unit] = {}

    def add(unit: Unit) -> None:
        if unit.key not in found and not (done_in is not None and unit.is_done(done_in)):
            for need in unit.needs.values():
                add(need)
            found[unit.key] = unit

    for unit in units:
        add(unit)
    return list(found.values())


def save_results(units: Iterable[Unit], out: Path, file: Path) -> None:
    """Write the scores of finished units into one compressed file, to be kept and restored."""
    lines = [
        json.dumps(
            {"key": unit.key, "kind": unit.kind, "name": unit.name}
            | {name: record[name] for name in KEPT if name in record}
        )
        for unit in {unit.key: unit for unit in units}.values()
        if unit.is_done(out) and "nats" in (record := unit.read(out))
    ]
    text = "".join(f"{line}\n" for line in lines).encode()
    file.write_bytes(gzip.compress(text, mtime=0))


def restore_results(units: Iterable[Unit], out: Path, file: Path) -> None:
    """Write the scores that `save_results` kept into the folders of units that are not done."""
    records = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    by_key = {record["key"]: record for record in records}
    for unit in units:
        if unit.key in by_key and not unit.is_done(out):
            unit.folder(out).mkdir(parents=True, exist_ok=True)
            (unit.folder(out) / "result.json").write_text(json.dumps(by_key[unit.key]))


def forget_scores_alone(units: Iterable[Unit], out: Path) -> None:
    """Delete the records of models that missing units need, but of which only scores were kept.

    They are computed again, with all that they are made from.
    """
    for unit in units:
        for need in unit.needs.values():
            weights = need.folder(out) / "model" / "model.safetensors"
            has_model = need.kind in ("model", "train")
            if has_model and not unit.is_done(out) and need.is_done(out) and not weights.is_file():
                (need.folder(out) / "result.json").unlink()


def run_units(units: Iterable[Unit], out: Path, data: Path, work: Work, *, workers: int) -> None:
    """Compute all missing units in order, in a number of processes.

    A unit that fails ends the run once the units that run beside it are done.
    """
    waiting = list_with_needs(units, done_in=out)
    total, done = len(waiting), 0
    open_keys = {unit.key for unit in waiting}
    context = multiprocessing.get_context("spawn")
    running: dict[Future[dict[str, Any]], Unit] = {}
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        while waiting or running:
            ready = [
                unit
                for unit in waiting
                if not any(need.key in open_keys for need in unit.needs.values())
            ]
            for unit in ready[: workers - len(running)]:
                running[pool.submit(do_unit, unit, out, data, work)] = unit
                waiting.remove(unit)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                unit = running.pop(future)
                record = future.result()
                open_keys.discard(unit.key)
                done += 1
                took = f"{record['cpu_seconds']:.0f} s of CPU time, {record['seconds']:.0f} s"
                print(f"{done}/{total} {unit.kind} {unit.name}: {took}", flush=True)


def _begin_worker() -> None:
    """Use one thread, and exit with the parent, so that a killed study leaves no process behind."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
