"""How stages tell how far they are, without knowing who listens."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Called with a title, what is done, of how much, in which unit."""

    def __call__(self, title: str, done: int, total: int, unit: str = "") -> None:
        """Take note that `done` of `total` units of the work called `title` are done."""
        ...


def report_nothing(title: str, done: int, total: int, unit: str = "") -> None:
    """Take note of nothing: for scripts and tests."""
