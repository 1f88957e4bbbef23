"""Units of work: each is done once, stored under a hash of all that decides it, and found again."""

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

from rayfuse.run.fingerprint import fingerprint_of, first_name

VERSIONS = {"aligned": 3}
"""By kind, 1 where there is none: raised when what such a unit computes changes, in the study or in
rayfuse, so that neither it nor what is made from it is found again."""


@dataclass(frozen=True)
class Unit:
    """A piece of work: what it is called, its settings, and the units it is made from."""

    kind: str
    name: str
    """For people; decides nothing."""
    settings: dict[str, Any]
    needs: dict[str, "Unit"] = field(default_factory=dict[str, "Unit"])
    """By role, in an order that may matter (sources)."""

    @cached_property
    def key(self) -> str:
        """Hash everything that decides the result."""
        # Renamed values keep their first name in keys, so that stored units stay valid.
        settings = {
            name: first_name(value) if isinstance(value, str) else value
            for name, value in self.settings.items()
        }
        return fingerprint_of(
            kind=self.kind,
            settings=settings,
            needs=[[role, unit.key] for role, unit in self.needs.items()],
            version=VERSIONS.get(self.kind, 1),
        )

    def folder(self, out: Path) -> Path:
        """Return where the result lies."""
        return out / "units" / f"{self.kind}-{self.key}"

    def is_done(self, out: Path) -> bool:
        """Return whether the result is whole: its record is written last."""
        return (self.folder(out) / "result.json").exists()

    def read(self, out: Path) -> dict[str, Any]:
        """Return the record of a unit that is done."""
        return json.loads((self.folder(out) / "result.json").read_bytes())


Work = Callable[[Unit, Path, Path, Path], dict[str, Any]]
"""Called with a unit, its own folder, the study's folder and the data's; returns its record."""


def do_unit(unit: Unit, out: Path, data: Path, work: Work) -> dict[str, Any]:
    """Make a unit whose needs are done, and write its record.

    `cpu_seconds` is this process' own time: it hardly depends on what else the machine does.
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


def list_with_needs(units: Iterable[Unit]) -> list[Unit]:
    """Return units and all they are made from, each once, what is needed before what needs it."""
    found: dict[str, Unit] = {}

    def add(unit: Unit) -> None:
        if unit.key not in found:
            for need in unit.needs.values():
                add(need)
            found[unit.key] = unit

    for unit in units:
        add(unit)
    return list(found.values())


def run_units(units: Iterable[Unit], out: Path, data: Path, work: Work, *, workers: int) -> None:
    """Do all units that are not done, the first ones first, in so many processes.

    A unit that fails ends the run once those beside it are done.
    """
    waiting = [unit for unit in list_with_needs(units) if not unit.is_done(out)]
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
                took = f"{record['cpu_seconds']:.0f} s of processor, {record['seconds']:.0f} s"
                print(f"{done}/{total} {unit.kind} {unit.name}: {took}", flush=True)


def _begin_worker() -> None:
    """Use one thread, and end with the study: a killed one must leave nothing running."""
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
