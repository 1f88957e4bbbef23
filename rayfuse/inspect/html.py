"""Two tokenizations of one text above one another, as a self-contained HTML page."""

import itertools
import unicodedata
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import numpy as np

from rayfuse.align.matches import keep_one_to_one
from rayfuse.align.pair import AlignedTexts
from rayfuse.align.token_spans import PlacedTokens, TokenBytes
from rayfuse.config.text import escape_html
from rayfuse.inspect.report import PairReport, name_token
from rayfuse.report.stylesheet import read_stylesheet

CELL, ROW, GAP = 9.0, 26.0, 30.0
"""Pixels: width of a character, height of a token, height between the two tokenizations."""

LINE_CELLS = 100
"""Characters in a line of the drawing, about."""

MAX_BYTES = 6000
"""Bytes of the text that are drawn, about: more is too long to scroll through."""

SIGNS = {"\n": "⏎", "\t": "→", "\r": "␍", " ": "·"}

KINDS = {
    "one to one": "#2a9d5c",
    "one target, several source": "#2f7fc1",
    "several target, one source": "#d9822b",
    "several to several": "#8e5bb5",
    "no signal": "#b03030",
}
"""Colour by the tokens between two shared boundaries. `no signal`: a tokenizer changed the text, or
the method does not accept the tokens."""


@dataclass(frozen=True)
class _Token:
    """A token's place in one text."""

    at: int
    """Among the shard's tokens."""
    start: int
    stop: int
    label: str


@dataclass(frozen=True)
class _Drawing:
    """One text in both tokenizations, and where its bytes are drawn."""

    data: bytes
    """The part of the text that is drawn, in UTF-8."""
    cells: np.ndarray
    """Where each byte begins, in characters from the start of the text."""
    target: list[_Token]
    source: list[_Token]
    shared: list[int]
    """Bytes at which both sides have a boundary."""
    has_signal: np.ndarray
    """Of each target position of the shard."""
    is_one_to_one: np.ndarray


def build_page(aligned: AlignedTexts, report: PairReport, names: tuple[str, str]) -> str:
    """Build the page: numbers, worst tokens, and the text in both tokenizations.

    Args:
        aligned: Texts in both tokenizers' tokens.
        report: Its numbers.
        names: Of the source and the target.
    """
    source_name, target_name = (escape_html(name) for name in names)
    keys = "".join(
        f'<span class="key" style="background:{colour}"></span>{kind}'
        for kind, colour in KINDS.items()
    )
    drawn = "\n".join(_draw_texts(aligned))
    num_bytes = sum(len(text.encode()) for text in aligned.texts)
    part = f": about {MAX_BYTES:,} of its {num_bytes:,} bytes" if num_bytes > MAX_BYTES else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{source_name} → {target_name}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{read_stylesheet()}</style></head><body><main>
<h1>How two tokenizers align</h1>
<p>Each line shows the <b>target</b>'s tokens ({target_name}) above the <b>source</b>'s
({source_name}). Dark lines are token boundaries that both share; colours show how the tokens
between two of them match:{keys}. A target position learns from the source if its next token begins
at a shared boundary and the method <b>{report.method}</b> accepts it. Tokens without text of their
own (EOS, a prefix space) are counted but not drawn.</p>
{_table_of_numbers(report)}
<h2>The text{part}</h2>
{drawn}
<h2>Target tokens that most often have no signal</h2>
{_table_of_worst(report)}
</main></body></html>
"""


def _table_of_numbers(report: PairReport) -> str:
    rows = [
        ("target tokens", f"{report.target_tokens:,}"),
        ("source tokens", f"{report.source_tokens:,}"),
        ("with a signal", f"{report.share_with_signal:.1%}"),
        ("inside a token, at most", f"{report.share_inside:.1%}"),
        ("one token to one", f"{report.share_one_to_one:.1%}"),
        ("inside a source token", f"{report.no_shared_boundary:,}"),
        *((f"unplaced, {reason}", f"{count:,}") for reason, count in report.unplaced.items()),
    ]
    cells = "".join(
        f'<tr><td class="name">{name}</td><td>{value}</td></tr>' for name, value in rows
    )
    return f"<table>{cells}</table>"


def _table_of_worst(report: PairReport) -> str:
    if not report.worst_tokens:
        return "<p>None: every position has a signal.</p>"
    rows = "".join(
        f'<tr><td class="name"><code>{escape_html(_show(worst.token))}</code></td>'
        f"<td>{worst.without_signal:,}</td>"
        f'<td>{worst.occurrences:,}</td><td class="name">{worst.flag}</td></tr>'
        for worst in report.worst_tokens
    )
    head = (
        '<th class="text">token</th><th>without signal</th>'
        '<th>occurrences</th><th class="text">kind</th>'
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
    drawing = _plan_drawing(aligned, text.encode(), start, num_bytes)
    lines: list[str] = []
    begin = 0
    while begin < len(drawing.data):
        end = _find_line_end(drawing, begin)
        lines.append(_draw_line(drawing, begin, end))
        begin = end
    return lines


def _plan_drawing(aligned: AlignedTexts, data: bytes, start: int, num_bytes: int) -> _Drawing:
    """Plan the drawing of a text, up to a shared boundary of characters after some bytes."""
    ends = [np.unique(side.ends) - start for side in (aligned.source, aligned.target)]
    shared = np.union1d(np.intersect1d(*ends, assume_unique=True), [0, len(data)])
    stop = len(data)
    for boundary in shared[np.searchsorted(shared, num_bytes) :].tolist():
        if boundary >= len(data) or (data[boundary] & 0xC0) != 0x80:
            stop = min(boundary, len(data))
            break
    matches = aligned.matches
    one_to_one = keep_one_to_one(matches, aligned.source, aligned.target)
    has_signal, is_one_to_one = np.zeros((2, len(aligned.target.ids)), dtype=bool)
    has_signal[matches.target_at] = is_one_to_one[one_to_one.target_at] = True
    return _Drawing(
        data=data[:stop],
        cells=_cell_of_bytes(data[:stop].decode()),
        target=_list_tokens(aligned.target, aligned.target_vocabulary, start, stop),
        source=_list_tokens(aligned.source, aligned.source_vocabulary, start, stop),
        shared=shared[(shared >= 0) & (shared <= stop)].tolist(),
        has_signal=has_signal,
        is_one_to_one=is_one_to_one,
    )


def _find_line_end(drawing: _Drawing, begin: int) -> int:
    """Find the next line end among the shared boundaries, else the last boundary that fits.

    Empty lines are drawn at the end of the line before them.
    """
    first = bisect_right(drawing.shared, begin)
    found = drawing.shared[first]
    for boundary in drawing.shared[first:]:
        is_far = drawing.cells[boundary] - drawing.cells[begin] > LINE_CELLS
        is_ended = drawing.data[found - 1 : found] == b"\n"
        if is_far or (is_ended and drawing.data[found:boundary].strip(b"\r\n")):
            break
        found = boundary
    return found


def _cell_of_bytes(text: str) -> np.ndarray:
    """Place each byte of a text, in characters from its start; wide characters count twice."""
    cells = [0.0]
    for char in text:
        num_bytes = len(char.encode())
        # A combining character may be a token of its own, so it gets a cell as well.
        width = 2.0 if unicodedata.east_asian_width(char) in "WF" else 1.0
        at = cells[-1]
        cells += [at + width * (byte + 1) / num_bytes for byte in range(num_bytes)]
    return np.array(cells)


def _list_tokens(
    placed: PlacedTokens, vocabulary: TokenBytes, start: int, num_bytes: int
) -> list[_Token]:
    tokens: list[_Token] = []
    done = start
    first, last = np.searchsorted(placed.ends, [start, start + num_bytes + 1])
    for at in range(int(first), int(last)):
        end = int(placed.ends[at])
        if end > done:
            label = name_token(vocabulary, int(placed.ids[at]))
            tokens.append(_Token(at, done - start, end - start, label))
            done = end
    return tokens


def _list_within(tokens: list[_Token], low: int, high: int) -> list[_Token]:
    """List the tokens that begin from one byte to before another."""
    first, stop = (bisect_left(tokens, byte, key=lambda token: token.start) for byte in (low, high))
    return tokens[first:stop]


def _draw_line(drawing: _Drawing, begin: int, end: int) -> str:
    """Draw the bytes from one shared boundary to another, as one SVG."""
    cells = drawing.cells
    left, width = cells[begin], (cells[end] - cells[begin]) * CELL
    parts: list[str] = []
    inside = drawing.shared[bisect_left(drawing.shared, begin) : bisect_right(drawing.shared, end)]
    for low, high in itertools.pairwise(inside):
        above = _list_within(drawing.target, low, high)
        below = _list_within(drawing.source, low, high)
        colour = KINDS[_kind_of(drawing, above, below)]
        x, wide = (cells[low] - left) * CELL, (cells[high] - cells[low]) * CELL
        parts.append(
            f'<rect x="{x:.1f}" y="{ROW}" width="{wide:.1f}" height="{GAP}" fill="{colour}" '
            'opacity=".28"/>'
        )
        for tokens, y in ((above, 0.0), (below, ROW + GAP)):
            parts += [_draw_token(drawing, left, token, y, colour) for token in tokens]
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{ROW - 3}" y2="{ROW + GAP + 3}"/>')
    height = 2 * ROW + GAP
    return f'<svg width="{width + 2:.0f}" height="{height:.0f}">{"".join(parts)}</svg>'


def _kind_of(drawing: _Drawing, above: list[_Token], below: list[_Token]) -> str:
    """Choose the kind of the tokens between two shared boundaries, by their first position."""
    position = above[0].at - 1 if above else -1  # -1 is the last position, which has no signal
    if not drawing.has_signal[position]:
        return "no signal"
    if drawing.is_one_to_one[position]:
        return "one to one"
    if len(above) == 1:
        return "one target, several source"
    return "several target, one source" if len(below) == 1 else "several to several"


def _draw_token(drawing: _Drawing, left: float, token: _Token, y: float, colour: str) -> str:
    """Draw one token: a box, its characters each in its cell, and its entry as a tooltip."""
    cells = drawing.cells
    x = (cells[token.start] - left) * CELL
    width = (cells[token.stop] - cells[token.start]) * CELL
    try:
        covered = drawing.data[token.start : token.stop].decode()
    except UnicodeDecodeError:
        covered = "▪"  # part of a character
    places = [(cells[token.start] - left) * CELL + 1.0]
    for char in covered[:-1]:
        wide = unicodedata.east_asian_width(char) in "WF"
        places.append(places[-1] + CELL * (2 if wide else 1))
    xs = " ".join(f"{place:.1f}" for place in places)
    return (
        f'<g><title>{escape_html(_show(token.label))}</title><rect x="{x + 0.5:.1f}" '
        f'y="{y + 1}" width="{max(width - 1, 1):.1f}" height="{ROW - 2}" rx="3" fill="{colour}" '
        f'fill-opacity=".12" stroke="{colour}"/><text x="{xs}" y="{y + 16.5}" xml:space="preserve">'
        f"{escape_html(_show(covered))}</text></g>"
    )
