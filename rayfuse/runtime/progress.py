"""Progress events: how stages report to their caller, without knowing how it is shown."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal[
    "corpus", "capture", "align", "train", "evaluate", "merge", "verify", "migrate", "demo"
]

CorpusPart = Literal["rows", "held-out"]
"""The parts of the corpus stage, in order: rows to train on, then rows to evaluate on."""


@dataclass(frozen=True)
class ProgressEvent:
    """State of one part of a stage, or a notice about it (`total` is 0)."""

    stage: Stage
    part: str
    """What is worked on: a data set, a source, a run or a model."""
    done: int = 0
    total: int = 0
    unit: str = ""
    """Of `done` and `total`, in the plural: shards, steps."""
    note: str = ""
    """Free text: the notice, or numbers to show beside a progress bar."""
    worker_seconds: float = 0.0
    """Time of all workers on this part so far, in this command; 0 where it is not known."""

    @property
    def title(self) -> str:
        """Name the part for a progress bar or a log line."""
        return f"{self.stage} {self.part}"


Progress = Callable[[ProgressEvent], None]
"""Receives the events of a stage; may be called from several threads."""


def report_nothing(event: ProgressEvent) -> None:
    """Ignore an event: for scripts and tests."""


ShouldStop = Callable[[], bool]
"""Whether a stage is to stop at the next place where nothing is lost."""


class StoppedEarly(RuntimeError):  # noqa: N818 (no error: a limit of the command is reached)
    """A stage has stopped as it was to; all that is committed is kept, and a new start resumes."""


def never_stop() -> bool:
    """Let a stage run to its end."""
    return False


class PaceEstimator:
    """Estimates the time left of each part from the pace observed since its first event."""

    def __init__(self) -> None:
        self.first_seen: dict[tuple[str, str], tuple[int, float]] = {}

    def estimate_seconds_left(self, event: ProgressEvent) -> float:
        """Estimate the seconds until a part is done; infinity until progress was observed."""
        now = time.monotonic()
        key = (event.stage, event.part)
        first_done, began = self.first_seen.setdefault(key, (event.done, now))
        if event.done <= first_done:
            return math.inf
        return (now - began) / (event.done - first_done) * (event.total - event.done)
