"""Show text from files (domains, names, reasons, paths): one function for each place it goes to.

Such text is a stranger's. It must not style, link or move anything where it is shown.
"""

import html
import re

CONTROLS = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(
        [
            *range(0x80, 0xA0),  # C1: terminals take U+009B for ESC [
            *(0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)),  # bidi
            *(0x2028, 0x2029),  # other line ends
            *range(0xD800, 0xE000),  # unpaired surrogates, which no UTF-8 output can take
        ],
        0xFFFD,
    ),
}
"""The sign that stands for each control character: its Unicode picture, or U+FFFD."""


def show_controls(text: str) -> str:
    """Replace control and bidi characters, except line feeds and tabs, by one sign each."""
    return text.translate(CONTROLS)


def show_on_one_line(text: str) -> str:
    """Replace all control characters and put the text on one line, for a log or a table's cell."""
    return show_controls(" ".join(text.split()))


def escape_html(text: str) -> str:
    """Escape text for HTML, in elements and attributes."""
    return html.escape(show_controls(text))


def escape_markdown(text: str) -> str:
    """Escape text for Markdown, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", show_on_one_line(text))


def mark_code(text: str) -> str:
    """Mark text as code for Markdown, on one line; backticks, which would end it, are removed."""
    return f"`{show_on_one_line(text).replace('`', '')}`"


def fence_code(text: str, language: str) -> str:
    """Put text into a code block for Markdown, with a fence longer than any run of backticks."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(longest + 1, 3)
    return f"{fence}{language}\n{show_controls(text)}\n{fence}"
