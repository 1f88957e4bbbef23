"""A stand-in for ray without a cluster."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any


class InlineRay:
    """Runs tasks in this process, in the order in which they were started."""

    def __init__(self) -> None:
        self.tasks: dict[str, Callable[[], Any]] = {}
        self.cancelled: list[str] = []

    def remote(self, **_: Any) -> Callable[[Any], Any]:
        return lambda function: SimpleNamespace(remote=partial(self._start, function))

    def _start(self, function: Any, *arguments: Any) -> str:
        name = f"task {len(self.tasks)}"
        self.tasks[name] = partial(function, *arguments)
        return name

    def wait(self, tasks: list[str], *, num_returns: int, timeout: float) -> Any:
        assert num_returns == 1
        assert timeout > 0
        return tasks[:1], tasks[1:]

    def get(self, task: str) -> Any:
        for argument in self.tasks[task].args:
            if isinstance(argument, str) and argument in self.tasks:
                self.get(argument)
        return self.tasks[task]()

    def cancel(self, task: str) -> None:
        self.cancelled.append(task)

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_assigned_resources=lambda: {"CPU": 1})
