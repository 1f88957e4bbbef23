"""Two tokenisations of one text above one another, as a self-contained HTML page."""

import html
import itertools
import unicodedata
from dataclasses import dataclass

import numpy as np

from rayfuse.align.inspect import AlignedTexts, PairReport, name_token

CELL, ROW, GAP = 9.0, 26.0, 30.0
"""Pixels: width of a character, height of a token, height between the two tokenisations."""

LINE_CELLS = 100
"""Characters in a line of the picture, about."""

MAX_BYTES = 6000
"""Of the text that is drawn: what a reader scrolls through."""

SIGNS = {"\n": "⏎", "\t": "→", "\r": "␍", " ": "·"}

KINDS = {
    "one to one": "#2a9d5c",
    "one target, several source": "#2f7fc1",
    "several target, one source": "#d9822b",
    "several to several": "#8e5bb5",
    "text changed by a tokenizer": "#b03030",
}
"""What lies between two shared boundaries, and its colour."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 1010px; margin: 2em auto; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: .25em .9em .25em 0; text-align: left; border-bottom: 1px solid #e3e7ec; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
code { background: #f1f4f7; padding: 0 .3em; border-radius: 3px; white-space: pre; }
svg { display: block; margin: 0 0 14px; overflow: visible; }
svg text { font: 14px ui-monospace, "DejaVu Sans Mono", "Noto Sans Mono CJK SC", monospace; }
.key { display: inline-block; width: .9em; height: .9em; border-radius: 2px; margin: 0 .35em 0 1em;
  vertical-align: -.1em; }
.side { color: #5c6774; }
"""


@dataclass(frozen=True)
class _Token:
    """A token's place in one text."""

    start: int
    stop: int
    label: str
    is_right: bool


@dataclass(frozen=True)
class _Drawing:
    """One text in both tokenisations, and where its bytes are drawn."""

    text: str
    cells: np.ndarray
    """Where each byte begins, in characters from the start of the text."""
    target: list[_Token]
    source: list[_Token]
    shared: list[int]
    """Bytes where both sides have a boundary."""


def build_picture(aligned: AlignedTexts, report: PairReport, names: tuple[str, str]) -> str:
    """Return the page: numbers, worst tokens, and the text in both tokenisations.

    Args:
        aligned: Texts in both tokenizers' tokens.
        report: Its numbers.
        names: What the source and the target are called.
    """
    source_name, target_name = (html.escape(name) for name in names)
    keys = "".join(
        f'<span class="key" style="background:{colour}"></span>{kind}'
        for kind, colour in KINDS.items()
    )
    drawn = "\n".join(_draw_texts(aligned))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{source_name} → {target_name}</title>
<style>{STYLE}</style></head><body>
<h1>How two tokenizers align</h1>
<p>Above, in each line, the <b>target</b>'s tokens ({target_name}); below, the
<b>source</b>'s ({source_name}). Between them, from one shared boundary to the next, what lies there
on both sides:{keys}. A target position learns from the source where its token begins at a shared
boundary, the dark line.</p>
{_table_of_numbers(report)}
<h2>The text</h2>
{drawn}
<h2>Target tokens that most often learn nothing</h2>
{_table_of_worst(report)}
</body></html>
"""


def _table_of_numbers(report: PairReport) -> str:
    rows = [
        ("target tokens", f"{report.target_tokens:,}"),
        ("source tokens", f"{report.source_tokens:,}"),
        ("with a signal", f"{report.share_with_signal:.1%}"),
        ("one token to one", f"{report.share_one_to_one:.1%}"),
        ("begin inside a source token", f"{report.no_shared_boundary:,}"),
        *((f"unplaced, {reason}", f"{count:,}") for reason, count in report.unplaced.items()),
    ]
    cells = "".join(
        f'<tr><td>{name}</td><td class="number">{value}</td></tr>' for name, value in rows
    )
    return f"<table>{cells}</table>"


def _table_of_worst(report: PairReport) -> str:
    if not report.worst_tokens:
        return "<p>None: every position has a signal.</p>"
    rows = "".join(
        f"<tr><td><code>{html.escape(_show(worst.token))}</code></td>"
        f'<td class="number">{worst.without_signal:,}</td>'
        f'<td class="number">{worst.occurrences:,}</td><td>{worst.flag}</td></tr>'
        for worst in report.worst_tokens
    )
    head = (
        '<th>token</th><th class="number">without</th><th class="number">occurs</th><th>kind</th>'
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def _show(text: str) -> str:
    return "".join(SIGNS.get(char, char) for char in text)


def _draw_texts(aligned: AlignedTexts) -> list[str]:
    """Draw the texts, line by line, until enough is drawn."""
    drawn: list[str] = []
    start, left = 0, MAX_BYTES
    for text in aligned.texts:
        data = text.encode()
        if left <= 0:
            break
        drawn += _draw_text(aligned, text, start, min(len(data), left))
        left -= len(data)
        start += len(data) + 1
    return drawn


def _draw_text(aligned: AlignedTexts, text: str, start: int, num_bytes: int) -> list[str]:
    target = _list_tokens(aligned, "target", start, len(text.encode()))
    source = _list_tokens(aligned, "source", start, len(text.encode()))
    ends = {0, len(text.encode())}
    shared = sorted({t.start for t in target} & {t.start for t in source} | ends)
    drawing = _Drawing(text, _cell_of_bytes(text), target, source, shared)
    lines: list[str] = []
    begin = 0
    while begin < num_bytes:
        end = _find_line_end(drawing, begin)
        lines.append(_draw_line(drawing, begin, end))
        begin = end
    return lines


def _find_line_end(drawing: _Drawing, begin: int) -> int:
    """Return the next line end among the shared boundaries, else the last that fits."""
    data, cells = drawing.text.encode(), drawing.cells
    later = [boundary for boundary in drawing.shared if boundary > begin]
    fitting = [boundary for boundary in later if cells[boundary] - cells[begin] <= LINE_CELLS]
    line_ends = [boundary for boundary in fitting if data[boundary - 1 : boundary] == b"\n"]
    return min(line_ends, default=max(fitting, default=later[0]))


def _cell_of_bytes(text: str) -> np.ndarray:
    """Return where each byte of a text is drawn, in characters; wide characters count twice."""
    cells = [0.0]
    for char in text:
        num_bytes = len(char.encode())
        # One that stands on the character before it still needs room, as a token of its own may.
        width = 2.0 if unicodedata.east_asian_width(char) in "WF" else 1.0
        at = cells[-1]
        cells += [at + width * (byte + 1) / num_bytes for byte in range(num_bytes)]
    return np.array(cells)


def _list_tokens(aligned: AlignedTexts, side: str, start: int, num_bytes: int) -> list[_Token]:
    placed = aligned.target if side == "target" else aligned.source
    vocabulary = aligned.target_vocabulary if side == "target" else aligned.source_vocabulary
    tokens: list[_Token] = []
    done = start
    first, last = np.searchsorted(placed.ends, [start, start + num_bytes + 1])
    for at in range(int(first), int(last)):
        end = int(placed.ends[at])
        if end > done:
            is_right = at == 0 or placed.faults[at - 1] == 0
            label = name_token(vocabulary, int(placed.ids[at]))
            tokens.append(_Token(done - start, end - start, label, bool(is_right)))
            done = end
    return tokens


def _draw_line(drawing: _Drawing, begin: int, end: int) -> str:
    """Draw the bytes from one shared boundary to another, as one SVG."""
    cells = drawing.cells
    left, width = cells[begin], (cells[end] - cells[begin]) * CELL
    parts: list[str] = []
    inside = [boundary for boundary in drawing.shared if begin <= boundary <= end]
    for low, high in itertools.pairwise(inside):
        above = [t for t in drawing.target if low <= t.start < high]
        below = [t for t in drawing.source if low <= t.start < high]
        colour = KINDS[_kind_of(above, below)]
        x, wide = (cells[low] - left) * CELL, (cells[high] - cells[low]) * CELL
        parts.append(
            f'<rect x="{x:.1f}" y="{ROW}" width="{wide:.1f}" height="{GAP}" fill="{colour}" '
            'opacity=".28"/>'
        )
        for tokens, y in ((above, 0.0), (below, ROW + GAP)):
            parts += [_draw_token(drawing, left, token, y, colour) for token in tokens]
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{ROW - 3}" y2="{ROW + GAP + 3}" '
            'stroke="#1c2430"/>'
        )
    height = 2 * ROW + GAP
    return f'<svg width="{width + 2:.0f}" height="{height:.0f}">{"".join(parts)}</svg>'


def _kind_of(above: list[_Token], below: list[_Token]) -> str:
    if not all(token.is_right for token in above + below):
        return "text changed by a tokenizer"
    one_above, one_below = len(above) == 1, len(below) == 1
    if one_above and one_below:
        return "one to one"
    if one_above:
        return "one target, several source"
    return "several target, one source" if one_below else "several to several"


def _draw_token(drawing: _Drawing, left: float, token: _Token, y: float, colour: str) -> str:
    """Draw one token: a box, its characters each in its cell, and its entry as a tooltip."""
    text, cells = drawing.text, drawing.cells
    x = (cells[token.start] - left) * CELL
    width = (cells[token.stop] - cells[token.start]) * CELL
    covered = text.encode()[token.start : token.stop].decode("utf-8", errors="replace")
    if "\ufffd" in covered and "\ufffd" not in text:
        covered = "▪"  # a part of a character
    places = [(cells[token.start] - left) * CELL + 1.0]
    for char in covered[:-1]:
        wide = unicodedata.east_asian_width(char) in "WF"
        places.append(places[-1] + CELL * (2 if wide else 1))
    xs = " ".join(f"{place:.1f}" for place in places)
    return (
        f'<g><title>{html.escape(_show(token.label))}</title><rect x="{x + 0.5:.1f}" '
        f'y="{y + 1}" width="{max(width - 1, 1):.1f}" height="{ROW - 2}" rx="3" fill="{colour}" '
        f'fill-opacity=".12" stroke="{colour}"/><text x="{xs}" y="{y + 18}" xml:space="preserve">'
        f"{html.escape(_show(covered))}</text></g>"
    )
