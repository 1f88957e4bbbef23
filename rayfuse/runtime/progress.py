"""How stages tell how far they are, without knowing who listens."""

import math
import time
from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Called with a title, what is done, of how much, in which unit, and what else there is."""

    def __call__(self, title: str, done: int, total: int, unit: str = "", note: str = "") -> None:
        """Take note that `done` of `total` units of the work called `title` are done.

        With a total of 0 the note is something to be said once, and nothing is counted.
        """
        ...


def report_nothing(title: str, done: int, total: int, unit: str = "", note: str = "") -> None:
    """Take note of nothing: for scripts and tests."""


class Pace:
    """How fast counted work goes, by its title."""

    def __init__(self) -> None:
        self.begun: dict[str, tuple[int, float]] = {}

    def estimate_left(self, title: str, done: int, total: int) -> float:
        """Return the seconds that work still takes; infinity until some of it was seen done."""
        now = time.monotonic()
        first, began = self.begun.setdefault(title, (done, now))
        return (now - began) / (done - first) * (total - done) if done > first else math.inf
