"""Print progress: bars on a terminal, a line from time to time in a log file."""

import sys
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment

from rayfuse.config.addresses import mask_secrets
from rayfuse.config.text import show_controls, show_on_one_line
from rayfuse.runtime.progress import ProgressEvent

LOG_SECONDS = 60.0
"""Minimum time between two lines of one stage without a terminal."""


class ProgressBars:
    """Shows a bar per title; may be called from several threads."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.lock = threading.Lock()
        self.tasks: dict[str, TaskID] = {}
        self.began: dict[str, tuple[float, float]] = {}
        """Time of the first event of a title, and its `done` then."""
        self.printed_at: dict[str, float] = {}
        """When the last line of a stage was printed to a log: monotonic time in seconds."""
        self.unprinted: dict[str, dict[str, str]] = {}
        """By stage and title, the newest state since then."""
        self.finished: set[str] = set()
        """Titles whose end was printed to a log."""
        self.bars = Progress(
            TextColumn("{task.description:<24}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]} {task.fields[rate]} {task.fields[note]}", markup=False),
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
        title, done, total = show_on_one_line(event.title), event.done, event.total
        unit, note = event.unit, show_on_one_line(mask_secrets(event.note))
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
            elif title not in self.finished:
                text = f"{title}: {done} of {total} {unit} {rate} {note}".rstrip()
                self._print_line(event.stage, title, text, is_end=done >= total, now=now)

    def _print_line(self, stage: str, title: str, text: str, *, is_end: bool, now: float) -> None:
        """Print a line for all parts of a stage that proceed side by side, from time to time.

        The end of a part is printed at once.
        """
        texts = self.unprinted.setdefault(stage, {})
        texts[title] = text
        if is_end:
            self.finished.add(title)
            self.console.print(f"  {texts.pop(title)}", highlight=False)
        elif now - self.printed_at.get(stage, -LOG_SECONDS) >= LOG_SECONDS:
            self.printed_at[stage] = now
            self.console.print(f"  {'; '.join(texts.values())}", highlight=False)
            texts.clear()


class PlainConsole(Console):
    """Prints text as it is: no markup, no emoji codes, credentials masked, control characters as
    signs.

    What is printed may come from a file (a domain, a reason, a path), so a style is an argument of
    `print` or a `Text`, never part of a string.
    """

    def __init__(self, file: Any, *, quiet: bool = False) -> None:
        super().__init__(file=file, soft_wrap=True, markup=False, emoji=False, quiet=quiet)

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(mask_secrets(o) if isinstance(o, str) else o for o in objects), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=show_controls(segment.text))


def open_console(*, to_stderr: bool) -> Console:
    """Open the console of a command: stderr if stdout is reserved for JSON."""
    return PlainConsole(sys.stderr if to_stderr else sys.stdout)
