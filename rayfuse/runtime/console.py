"""Print progress: bars on a terminal and in a notebook, a line from time to time in a log file."""

import sys
import textwrap
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
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Column
from rich.text import Text

from rayfuse.config.addresses import mask_secrets
from rayfuse.config.text import show_controls, show_on_one_line
from rayfuse.runtime.notebook import OUTPUT_WIDTH, CellOutput, is_notebook
from rayfuse.runtime.progress import ProgressEvent

BAR_WIDTH = 20
"""Characters of a bar."""

LOG_SECONDS = 60.0
"""Minimum time between two lines of one stage without a terminal."""


class NoteColumn(TextColumn):
    """Text that is shortened where the line is too narrow."""

    def render(self, task: Task) -> Text:
        """Render the text of a task on one line."""
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


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
        self.cell = CellOutput() if is_notebook() and not console.quiet else None
        fixed = Column(no_wrap=True)  # else the bar and the times vanish, in favour of the note
        self.bars = Progress(
            TextColumn("{task.description:<24}", markup=False),
            BarColumn(bar_width=BAR_WIDTH, table_column=fixed),
            MofNCompleteColumn(table_column=fixed),
            NoteColumn(
                "{task.fields[unit]} {task.fields[rate]} {task.fields[note]}",
                markup=False,
                table_column=Column(no_wrap=False),
            ),
            TimeElapsedColumn(table_column=fixed),
            TextColumn("left"),
            TimeRemainingColumn(table_column=fixed),
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
        if self.cell is not None and self.tasks:
            self.cell.show(self.bars.get_renderable(), is_last=True)

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
            if self.console.is_terminal or self.cell is not None:
                if title not in self.tasks:
                    self.tasks[title] = self.bars.add_task(
                        title, total=total, unit=unit, rate=rate, note=note
                    )
                self.bars.update(
                    self.tasks[title], completed=done, total=total, rate=rate, note=note
                )
                if self.cell is not None:
                    self.cell.show(self.bars.get_renderable())
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
        # FORCE_COLOR, which kernels set, makes any stream a terminal, and rich's own form for
        # notebooks makes each line an output of its own.
        in_cell = {"force_terminal": False, "width": OUTPUT_WIDTH} if is_notebook() else {}
        options: dict[str, Any] = {"markup": False, "emoji": False, "quiet": quiet, **in_cell}
        super().__init__(file=file, soft_wrap=True, force_jupyter=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        shown = (self._wrap(mask_secrets(o)) if isinstance(o, str) else o for o in objects)
        super().print(*shown, **options)

    def _wrap(self, text: str) -> str:
        """Wrap long lines between words, on a terminal; a path longer than a line is not broken."""
        if not self.is_terminal:
            return text
        return "\n".join(
            part
            for line in text.split("\n")
            for part in textwrap.wrap(
                line,
                self.width,
                subsequent_indent=" " * (len(line) - len(line.lstrip())),
                break_long_words=False,
                break_on_hyphens=False,
                replace_whitespace=False,
                expand_tabs=False,
            )
            or [line]
        )

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=show_controls(segment.text))


def open_console(*, to_stderr: bool) -> Console:
    """Open the console of a command: stderr if stdout is reserved for JSON.

    In a notebook it is stdout in any case: stderr has the colour of errors there.
    """
    return PlainConsole(sys.stderr if to_stderr and not is_notebook() else sys.stdout)
