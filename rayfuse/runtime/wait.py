"""Waiting for Ray tasks until a limit of the command, and a bounded time after it."""

import time
from typing import Any

import ray
from ray.exceptions import RayTaskError

from rayfuse.runtime.progress import ShouldStop, StoppedEarly

POLL_SECONDS = 5.0
"""Between two checks of a limit while no task ends."""

MAX_STOP_SECONDS = 1800.0
"""How long after a limit a result in progress may still be completed and stored."""


def fetch_result(reference: Any, *expected: type[Exception]) -> Any:
    """Fetch a task's result; raise an expected error of it without Ray's traceback."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, expected):
            raise error.cause from error
        raise


class TaskWait:
    """Waits for tasks whose results count once several of them are stored as one."""

    def __init__(self, should_stop: ShouldStop) -> None:
        """Wait for nothing yet.

        Args:
            should_stop: Whether the command is to stop.
        """
        self.should_stop = should_stop
        self.deadline: float | None = None
        """Monotonic time until which results in progress are waited for, once it is to stop."""

    def take_ready(self, waiting: list[Any]) -> tuple[Any, list[Any]]:
        """Wait until one task has ended, and return it and the others.

        Raises:
            StoppedEarly: The command is to stop, and results in progress take too long.
        """
        while not self._is_over():
            ready, others = ray.wait(waiting, num_returns=1, timeout=POLL_SECONDS)
            if self.deadline is None and self.should_stop():
                self.deadline = time.monotonic() + MAX_STOP_SECONDS
            if ready:
                return ready[0], others
        raise StoppedEarly

    def _is_over(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def check_stored(self) -> None:
        """Stop here, where a result is stored, if the command is to stop.

        Raises:
            StoppedEarly: It is.
        """
        if self.should_stop():
            raise StoppedEarly
