"""Draw what a terminal shows of a command, for the docs: `python -m docs.terminal_pictures`.

Each command runs on a pseudo-terminal, and pyte keeps the screen that its output leaves: bars that
are drawn again, colours, tables. rich draws that screen as an SVG file. The demo takes minutes.
"""

import fcntl
import itertools
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from io import StringIO
from operator import itemgetter
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

PICTURES = Path(__file__).parent / "pictures"
COLUMNS, LINES = 110, 200
FONT_RULE = re.compile(r"@font-face \{\{.*?\}\}", re.S)
"""Fonts that rich's SVG format would load from the network."""

DEMO = "rayfuse demo"
MISTAKE = "rayfuse run my.yaml trian.epochs=2"


def read_screen(words: list[str], folder: Path) -> Text:
    """Run a command on a pseudo-terminal, and return the screen that it leaves.

    Args:
        words: The command.
        folder: The folder in which it runs.
    """
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    variables = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    with subprocess.Popen(
        words, cwd=folder, env=variables, stdin=follower, stdout=follower, stderr=follower
    ) as process:
        os.close(follower)
        while True:
            try:
                data = os.read(leader, 65536)
            except OSError:  # Linux reports the end of a pseudo-terminal as EIO
                break
            if not data:
                break
            stream.feed(data)
        process.wait()
    os.close(leader)
    lines = [_style_line(screen.buffer[row]) for row in range(LINES)]
    while lines and not lines[-1].plain.strip():
        lines.pop()
    return Text("\n").join(lines)


def _style_line(cells: dict[int, pyte.screens.Char]) -> Text:
    text = Text()
    parts = ((_find_style(cells[column]), cells[column].data) for column in range(COLUMNS))
    for style, part in itertools.groupby(parts, key=itemgetter(0)):
        text.append("".join(character for _, character in part), style)
    text.rstrip()
    return text


def _find_style(cell: pyte.screens.Char) -> Style:
    return Style(color=_name_colour(cell.fg), bold=cell.bold or None, reverse=cell.reverse or None)


def _name_colour(colour: str) -> str | None:
    """Translate pyte's name of a colour, or its six hexadecimal digits, to rich's."""
    if colour == "default":
        return None
    if re.fullmatch("[0-9a-f]{6}", colour):
        return f"#{colour}"
    name = colour.replace("brown", "yellow")
    return f"bright_{name.removeprefix('bright')}" if name.startswith("bright") else name


def draw(screen: Text, title: str) -> str:
    """Draw a screen as SVG without anything from the network."""
    from rich._export_format import CONSOLE_SVG_FORMAT

    console = Console(record=True, width=COLUMNS, file=StringIO())
    console.print(screen, soft_wrap=True)
    form = FONT_RULE.sub("", CONSOLE_SVG_FORMAT)
    return console.export_svg(title=title, code_format=form, unique_id="terminal")


def main() -> None:
    """Draw both pictures."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "work")
        place.mkdir()
        recipe = subprocess.run(
            [sys.executable, "-m", "rayfuse", "init"], capture_output=True, text=True, check=True
        )
        (place / "my.yaml").write_text(recipe.stdout)
        for name, command in (("mistake", MISTAKE), ("demo", DEMO)):
            screen = read_screen([sys.executable, "-m", *command.split()], place)
            prompt = Text(f"$ {command}\n", style="bold")
            (PICTURES / f"{name}.svg").write_text(draw(prompt + screen, command))


if __name__ == "__main__":
    main()
