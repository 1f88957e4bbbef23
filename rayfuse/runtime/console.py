"""Print progress: bars on a terminal, a line from time to time in a log file."""

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
"""Minimum time between two lines of one title without a terminal."""


class ProgressBars:
    """Shows a bar per title; may be called from several threads."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.lock = threading.Lock()
        self.tasks: dict[str, TaskID] = {}
        self.began: dict[str, tuple[float, float]] = {}
        """Time of the first event of a title, and its `done` then."""
        self.printed_at: dict[str, float] = {}
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
            done_since = done - done_before
            rate = f"{done_since / (now - began):.2f}/s" if now > began and done_since else ""
            if self.console.is_terminal:
                if title not in self.tasks:
                    self.tasks[title] = self.bars.add_task(
                        title, total=total, unit=unit, rate=rate, note=note
                    )
                self.bars.update(
                    self.tasks[title], completed=done, total=total, rate=rate, note=note
                )
            elif done >= total or now - self.printed_at.get(title, -LOG_SECONDS) >= LOG_SECONDS:
                if self.printed_at.get(title) == float("inf"):
                    return
                self.printed_at[title] = float("inf") if done >= total else now
                self.console.print(
                    f"  {title}: {done} of {total} {unit} {rate} {note}", highlight=False
                )


def open_console(*, to_stderr: bool) -> Console:
    """Open the console of a command: stderr if stdout is reserved for JSON."""
    return Console(file=sys.stderr if to_stderr else sys.stdout, soft_wrap=True)
