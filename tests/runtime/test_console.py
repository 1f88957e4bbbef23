"""What commands print is the text itself, whatever a file's names contain."""

import io
import logging
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
from rich.table import Table
from rich.text import Text

from rayfuse.capture.stage import Outcome, SourceCapture
from rayfuse.config.models import SourceSettings
from rayfuse.runtime.console import PlainConsole, ProgressBars
from rayfuse.runtime.logging import log_event
from rayfuse.runtime.progress import ProgressEvent

HOSTILE = ["[/b]", "[link=http://x]y[/link]", "[bold red]", ":bomb:", "a\\[b]"]
CONTROL = "\x1b]0;title\x07\x1b[2J\x9b1m\u202ex"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def print_everywhere(text: str, file: io.StringIO) -> None:
    """Print text as a line, as cells of a table and in both forms of progress."""
    console = PlainConsole(file)
    console.width = 400
    console.print(f"line {text}")
    table = Table(text, "other", title=text)
    table.add_row(text, Text(text, "bold"))
    console.print(table)
    with ProgressBars(console) as bars:
        bars(ProgressEvent("capture", text, note=f"stopped: {text}"))
        bars(ProgressEvent("capture", text, 1, 2, "shards", text))


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("file", [io.StringIO, Terminal])
def test_markup_in_text_is_text(text: str, file: type[io.StringIO]):
    output = file()
    print_everywhere(text, output)
    assert output.getvalue().count(text) >= 6


@pytest.mark.parametrize("file", [io.StringIO, Terminal])
def test_control_characters_in_text_are_signs(file: type[io.StringIO]):
    output = file()
    print_everywhere(CONTROL, output)
    printed = output.getvalue()
    assert "\u241b]0;title\u2407" in printed
    for char in "\x07\x9b\u202e":
        assert char not in printed
    assert "\x1b]" not in printed
    assert "\x1b[2J" not in printed


@pytest.mark.parametrize(("file", "lines"), [(io.StringIO, 1), (Terminal, 3)])
def test_sentences_wrap_between_words_on_a_terminal_and_a_path_is_one_piece(
    file: type[io.StringIO], lines: int
):
    output, path = file(), f"/{'folder' * 10}"
    console = PlainConsole(output)
    console.width = 40
    console.print(f"the models of this run are stored here: {path} and there", highlight=False)
    printed = output.getvalue().splitlines()
    assert len(printed) == lines
    assert path in (line.strip() for line in printed) or lines == 1
    assert " ".join(line.strip() for line in printed).split()[-3:] == [path, "and", "there"]


def test_a_long_note_is_shortened_and_not_the_bar_or_the_times():
    console = PlainConsole(Terminal())
    console.width = 100
    note = "loss 4.596, 11,737 tokens/s, 57% waiting for data"
    with ProgressBars(console) as bars:
        bars(ProgressEvent("train", "fused", 7, 7, "steps", note))
        shown = io.StringIO()
        narrow = PlainConsole(shown)
        narrow.width = 100
        narrow.print(bars.bars.get_renderable())
    (line,) = shown.getvalue().splitlines()
    assert line.startswith("train fused              ━━━━━━━━━━━━━━━━━━━━ 7/7 steps ")
    assert " loss 4.596" in line and "…" in line
    assert " left " in line


def test_a_notice_is_one_line():
    output = io.StringIO()
    with ProgressBars(PlainConsole(output)) as bars:
        bars(ProgressEvent("capture", "a", note="x\nrayfuse: error: forged"))
    assert output.getvalue() == "  capture a: x rayfuse: error: forged\n"


def test_a_log_has_a_line_a_minute_for_all_that_proceeds_side_by_side(monkeypatch):
    output, clock = io.StringIO(), [1000.0]
    monkeypatch.setattr("rayfuse.runtime.console.time.monotonic", lambda: clock[0])
    with ProgressBars(PlainConsole(output)) as bars:
        for second in range(100):
            clock[0] = 1000.0 + second
            bars(ProgressEvent("train", "clm", second, 200, "steps"))
            bars(ProgressEvent("train", "fused", second, 200, "steps", "slow"))
        bars(ProgressEvent("train", "clm", 200, 200, "steps"))
        bars(ProgressEvent("train", "clm", 200, 200, "steps"))
    assert output.getvalue().splitlines() == [
        "  train clm: 0 of 200 steps",
        "  train fused: 59 of 200 steps 1.00/s slow; train clm: 60 of 200 steps 1.00/s",
        "  train clm: 200 of 200 steps 2.02/s",
    ]


def test_an_event_in_a_log_is_one_line(caplog):
    logger = logging.getLogger("rayfuse.events")
    with caplog.at_level(logging.INFO, logger.name):
        log_event("reject", reason="a\n2026 rayfuse done\x1b[2J")
    assert caplog.messages == ["reject reason=a 2026 rayfuse done\u241b[2J"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_error_of_a_capture_arrives_even_if_progress_fails(monkeypatch):
    def fail(event: ProgressEvent) -> None:
        raise RuntimeError("the terminal is gone")

    def stop(self: SourceCapture) -> None:
        raise ValueError("model_type is '[/b]'")

    monkeypatch.setattr(SourceCapture, "_capture", stop)
    monkeypatch.setattr(SourceCapture, "_note", lambda self, text: self.progress(None))
    capture = object.__new__(SourceCapture)
    object.__setattr__(capture, "progress", fail)
    source = SourceSettings(name="a", model="m")
    object.__setattr__(capture, "work", SimpleNamespace(source=source))
    ended: SimpleQueue[Outcome] = SimpleQueue()
    with pytest.raises(RuntimeError, match="the terminal is gone"):
        capture.run(ended)
    ended_source, error = ended.get(timeout=1)
    assert ended_source is source
    assert isinstance(error, ValueError)
    assert str(error) == "model_type is '[/b]'"
