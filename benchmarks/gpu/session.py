"""A list of measurements within a time budget: one that fails, dies or hangs ends no other.

They run in order in a child process, which is replaced after a failure: an error of a GPU can make
all further work of its process fail, and its memory is freed with it.
"""

import gc
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

Row = dict[str, Any]
"""What is recorded of a measurement: one line of JSON."""

MIN_SECONDS = 1.0
"""With less time left no measurement is started."""


class UnavailableError(Exception):
    """A measurement does not apply here: a library or a second GPU is missing."""


@dataclass(frozen=True)
class Measurement:
    """A function that returns numbers by name, and its arguments."""

    name: str
    function: str
    """`module:function`, imported in the child process alone."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments; they are recorded, too."""
    max_seconds: float = 150.0
    """After which it is stopped, since it may hang."""
    is_apart: bool = False
    """Whether its process ends with it, because it leaves something in memory."""


def measure_all(
    measurements: Sequence[Measurement], *, seconds: float, record: Callable[[Row], None]
) -> list[Row]:
    """Measure in order within a time budget.

    Args:
        measurements: What to measure; the most important first.
        seconds: The budget. At its end, the measurement that runs is stopped.
        record: Called with each row as soon as it is known.

    Returns:
        One row for each measurement.
    """
    deadline = time.monotonic() + seconds
    child = Child()
    rows: list[Row] = []
    try:
        for measurement in measurements:
            began = time.monotonic()
            found = _measure_within(child, measurement, deadline - began)
            row = {"measurement": measurement.name, "settings": measurement.settings} | found
            row["seconds"] = round(time.monotonic() - began, 2)
            record(row)
            rows.append(row)
    finally:
        child.stop()
    return rows


def _measure_within(child: "Child", measurement: Measurement, left: float) -> Row:
    if left < MIN_SECONDS:
        return {"status": "skipped", "reason": "the time budget is used up"}
    found = child.measure(measurement, min(left, measurement.max_seconds))
    if found is not None:
        return found
    if left <= measurement.max_seconds:
        return {"status": "skipped", "reason": "stopped at the end of the time budget"}
    return {"status": "failed", "reason": f"stopped after {measurement.max_seconds:.0f} s"}


class Child:
    """A process that measures, started when it is needed."""

    def __init__(self) -> None:
        self.process: Any = None
        self.connection: Connection | None = None

    def measure(self, measurement: Measurement, seconds: float) -> Row | None:
        """Measure in the process; None if it takes longer than some seconds."""
        try:
            connection = self._connect()
            connection.send(measurement)
            found = connection.recv() if connection.poll(seconds) else None
        except (EOFError, OSError):  # it is gone
            assert self.process is not None
            self.process.join(10)
            code = self.process.exitcode
            found = {"status": "failed", "reason": f"the process ended with exit code {code}"}
        if found is None or found["status"] == "failed" or measurement.is_apart:
            self.stop()
        return found

    def stop(self) -> None:
        """Kill the process, if there is one: a computation on a GPU cannot be interrupted."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self.process = self.connection = None

    def _connect(self) -> Connection:
        if self.connection is None:
            spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
            self.connection, other = spawn.Pipe()
            self.process = spawn.Process(target=serve, args=(other,), daemon=True)
            self.process.start()
            other.close()  # else the end of the process would not be seen
        return self.connection


def serve(connection: Connection) -> None:
    """Measure what comes through a connection, until a measurement fails."""
    status = ""
    while status != "failed":
        try:
            measurement: Measurement = connection.recv()
        except EOFError:
            return
        row = _measure_here(measurement)
        status = row["status"]
        connection.send(row)


def _measure_here(measurement: Measurement) -> Row:
    module, name = measurement.function.split(":")
    _free_memory()
    try:
        values = getattr(import_module(module), name)(**measurement.settings)
    except UnavailableError as missing:
        return {"status": "skipped", "reason": str(missing)}
    except Exception as error:  # whatever a kernel or a library raises is a result, too
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
        return {"status": "failed", "reason": reason, "traceback": traceback.format_exc()}
    return {"status": "measured", "values": values}


def _free_memory() -> None:
    """Free what the last measurement left on the GPU."""
    gc.collect()
    torch: Any = sys.modules.get("torch")  # not imported for measurements without it
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
