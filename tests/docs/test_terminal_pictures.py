"""Pictures of a terminal show what a terminal shows, and load nothing."""

import re
import sys
from pathlib import Path

import pytest

from docs.terminal_pictures import MISTAKE, PICTURES, draw, read_screen

PROGRAM = r"""
import sys
assert sys.stdout.isatty()
print("first\nsecond")
print("\x1b[1A\x1b[2K\x1b[31mbar 1 of 2\x1b[0m", end="\r")
print("\x1b[2K\x1b[1;32mbar 2 of 2\x1b[0m <&>")
"""


def test_a_picture_has_the_last_state_of_every_line_with_its_colours(tmp_path: Path):
    screen = read_screen([sys.executable, "-c", PROGRAM], tmp_path)
    assert screen.plain == "first\nbar 2 of 2 <&>"
    styles = {screen.plain[span.start : span.end]: str(span.style) for span in screen.spans}
    assert styles["bar 2 of 2"] == "bold green"
    picture = draw(screen, "title")
    assert "1&#160;of&#160;2" not in picture
    assert "2&#160;of&#160;2" in picture
    assert "&lt;&amp;&gt;" in picture
    assert re.findall("url|href|src=", picture) == ["url"] * picture.count("url(#terminal")


@pytest.mark.parametrize("name", ["mistake", "demo"])
def test_the_docs_show_a_picture_of_a_command(name: str):
    assert (PICTURES / f"{name}.svg").read_text().startswith("<svg")
    pages = [path.read_text() for path in PICTURES.parent.rglob("*.md")]
    assert any(f"pictures/{name}.svg" in text for text in pages)


def test_the_picture_of_a_mistake_has_its_message(tmp_path: Path):
    (tmp_path / "my.yaml").write_text("storage: here\n")
    screen = read_screen([sys.executable, "-m", *MISTAKE.split()], tmp_path)
    shown = (PICTURES / "mistake.svg").read_text().replace("&#160;", " ").replace("&#x27;", "'")
    assert "did you mean 'train'?" in screen.plain
    assert "did you mean 'train'?" in shown
