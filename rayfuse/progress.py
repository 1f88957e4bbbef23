"""How stages tell how far they are, without knowing who listens."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Called with a title, what is done, of how much, in which unit, and what else there is."""

    def __call__(self, title: str, done: int, total: int, unit: str = "", note: str = "") -> None:
        """Take note that `done` of `total` units of the work called `title` are done."""
        ...


def report_nothing(title: str, done: int, total: int, unit: str = "", note: str = "") -> None:
    """Take note of nothing: for scripts and tests."""


class Board:
    """An actor where workers write how far they are, and the driver reads it."""

    def __init__(self) -> None:
        self.steps: dict[str, tuple[int, int]] = {}

    def write(self, name: str, step: int, num_steps: int) -> None:
        """Take note of a step of something that runs."""
        self.steps[name] = (step, num_steps)

    def read(self) -> dict[str, tuple[int, int]]:
        """Return the step and the number of steps of all that runs."""
        return self.steps
