"""Text from files cannot style, link, move or forge anything where it is shown."""

import html

import pytest

from rayfuse.config.text import (
    CONTROLS,
    escape_html,
    escape_markdown,
    fence_code,
    mark_code,
    show_controls,
    show_on_one_line,
)

HOSTILE = "a\x1b]52;c;YQ==\x07b\x9b2J\u202egnp\u2066\u2028x\x7f\ud800\r\n# head\n```\n<b>*[l](u)|`"


@pytest.mark.parametrize(
    "show", [show_controls, show_on_one_line, escape_html, escape_markdown, mark_code]
)
def test_no_control_character_is_left(show):
    shown = show(HOSTILE)
    assert not [char for char in shown if ord(char) in CONTROLS]
    assert shown.encode()  # also where a file name was not UTF-8
    assert "\u241b" in shown


def test_line_feeds_stay_only_where_lines_are_meant():
    assert show_controls("a\n\tb\r") == "a\n\tb\u240d"
    assert show_on_one_line("a\n\tb\r\x85c") == "a b c"
    assert "\n" not in escape_markdown(HOSTILE) + mark_code(HOSTILE)


def test_one_sign_stands_for_one_character():
    assert len(show_controls(HOSTILE)) == len(HOSTILE)


def test_ordinary_text_of_any_script_stays():
    text = "naïve – 漢字 नमस्ते עברית 👩‍👩‍👧 $x$"
    assert show_controls(text) == show_on_one_line(text) == text
    assert html.unescape(escape_html(text)) == text


def test_text_cannot_end_its_code_block():
    block = fence_code("a: |\n  ````\n  # head", "yaml")
    assert block.splitlines()[0] == "`````yaml"
    assert block.splitlines()[-1] == "`````"
    assert fence_code("a: 1", "yaml") == "```yaml\na: 1\n```"
