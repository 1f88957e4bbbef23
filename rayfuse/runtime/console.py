"""What the command prints: progress bars on a terminal, now and then a line in a log."""

import sys
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rayfuse.runtime.progress import ProgressEvent

LOG_SECONDS = 15.0
"""Between two lines of one title where there is no terminal."""


class ProgressBars:
    """A bar per title; safe to call from several threads."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.lock = threading.Lock()
        self.tasks: dict[str, TaskID] = {}
        self.began: dict[str, tuple[float, float]] = {}
        """When a title was first heard of, and what was done by then."""
        self.told: dict[str, float] = {}
        self.bars = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]} {task.fields[rate]} {task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "ProgressBars":
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def __call__(self, event: ProgressEvent) -> None:
        """Update the bar of an event, or print it if it is a notice."""
        title, done, total = event.title, event.done, event.total
        unit, note = event.unit, event.note
        if not total:
            self.console.print(f"  {title}: {note}", highlight=False)
            return
        now = time.monotonic()
        with self.lock:
            began, done_before = self.began.setdefault(title, (now, done))
            fresh = done - done_before
            rate = f"{fresh / (now - began):.2f}/s" if now > began and fresh else ""
            if self.console.is_terminal:
                if title not in self.tasks:
                    self.tasks[title] = self.bars.add_task(
                        title, total=total, unit=unit, rate=rate, note=note
                    )
                self.bars.update(
                    self.tasks[title], completed=done, total=total, rate=rate, note=note
                )
            elif done >= total or now - self.told.get(title, -LOG_SECONDS) >= LOG_SECONDS:
                if self.told.get(title) == float("inf"):
                    return
                self.told[title] = float("inf") if done >= total else now
                self.console.print(
                    f"  {title}: {done} of {total} {unit} {rate} {note}", highlight=False
                )


def open_console(*, to_stderr: bool) -> Console:
    """Return where the command prints; stderr where stdout is for a program."""
    return Console(file=sys.stderr if to_stderr else sys.stdout, soft_wrap=True)
