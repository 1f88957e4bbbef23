"""In the kernel of a notebook: where text goes, and progress that is replaced in place."""

import importlib
import io
import sys
import threading
import time
from typing import Any

from rich.console import Console, RenderableType

UPDATE_SECONDS = 0.5
"""Minimum time between two updates of an output: each is a message to the browser."""
OUTPUT_WIDTH = 120
"""Characters of a line that fit a cell's output."""


def is_notebook() -> bool:
    """Check whether this process is the kernel of a notebook; IPython in a terminal is none."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


class CellInterrupted(KeyboardInterrupt):
    """The kernel was interrupted while a run was executed."""

    def _render_traceback_(self) -> list[str]:
        """Show the message alone, which IPython does in place of a traceback."""
        return [f"KeyboardInterrupt: {self}"]


class CellOutput:
    """An output of a cell whose text is replaced as work proceeds. No widget library is needed."""

    def __init__(self) -> None:
        self.handle: Any = None
        self.shown_at = -UPDATE_SECONDS
        self.lock = threading.Lock()

    def show(self, content: RenderableType, *, is_last: bool = False) -> None:
        """Show some content in place of what was shown before; skipped if that was just now.

        Args:
            content: A table of progress bars.
            is_last: It is shown in any case.
        """
        with self.lock:
            now = time.monotonic()
            if now - self.shown_at < UPDATE_SECONDS and not is_last:
                return
            self.shown_at = now
            bundle = {"text/plain": render_text(content)}
            if self.handle is None:
                display = importlib.import_module("IPython.display").display
                self.handle = display(bundle, raw=True, display_id=True)
            else:
                self.handle.update(bundle, raw=True)


def render_text(content: RenderableType) -> str:
    """Render content of rich as plain text of `OUTPUT_WIDTH` characters a line."""
    file = io.StringIO()
    # FORCE_COLOR, which kernels set, makes any stream a terminal.
    options: dict[str, Any] = {"force_terminal": False, "color_system": None}
    Console(file=file, width=OUTPUT_WIDTH, force_jupyter=False, **options).print(content)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())
