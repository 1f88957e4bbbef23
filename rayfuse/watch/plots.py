"""Lines over the steps of a training, as SVG: no axis is ruled by a single outlier."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rayfuse.config.text import escape_html
from rayfuse.report.colours import OWN_COLOURS, SOURCE_COLOURS

WIDTH, HEIGHT = 440.0, 230.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 10.0, 10.0, 34.0
"""Margins: for the numbers of the axes."""

DASHES = ("", "7 4", "2 3", "10 3 2 3", "4 2", "1 4", "12 4")
"""Patterns of the lines, so that no line is known by its colour alone."""

OUTER_SHARE = 0.02
"""The share of the points at either end that does not decide the range of an axis."""

ROOM = 0.06
"""Added to the range of the axis at both ends, as a share of it."""


@dataclass(frozen=True)
class Line:
    """One line of a plot."""

    name: str
    points: list[tuple[float, float]]
    """(step, value), in order of the steps."""


@dataclass(frozen=True)
class Axis:
    """A vertical axis."""

    low: float
    high: float
    is_log: bool

    def place(self, value: float) -> float:
        """Place a value: 0 at the bottom, 1 at the top; values outside lie on the edge."""
        low, high = self._scale(self.low), self._scale(self.high)
        if self.is_log and value <= 0:
            return 0.0
        return min(max((self._scale(value) - low) / (high - low), 0.0), 1.0)

    def _scale(self, value: float) -> float:
        return math.log(value) if self.is_log else value

    def list_ticks(self) -> list[float]:
        """List about four round values within the axis."""
        if not self.is_log:
            return _list_round(self.low, self.high)
        start, stop = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for factors in ((1,), (1, 3), (1, 2, 5)):
            found = [f * 10.0**e for e in range(start, stop + 1) for f in factors]
            ticks = [tick for tick in found if self.low <= tick <= self.high]
            if len(ticks) > 2:
                return ticks[:: -(-len(ticks) // 5)]
        return _list_round(self.low, self.high)


def _list_round(low: float, high: float) -> list[float]:
    """List round values at equal distances of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def choose_axis(values: Sequence[float], *, is_log: bool) -> Axis:
    """Choose the range of an axis: that of all values but the outermost.

    Args:
        values: All values of the plot; on a log axis only those above 0 count.
        is_log: Logarithmic.
    """
    ordered = sorted(value for value in values if value > 0 or not is_log)
    if not ordered:
        return Axis(0.1, 1.0, is_log)
    skipped = int(len(ordered) * OUTER_SHARE)
    low, high = ordered[skipped], ordered[-1 - skipped]
    if is_log:
        factor = (high / low) ** ROOM if high > low else 1.1
        return Axis(low / factor, high * factor, is_log)
    room = (high - low) * ROOM or max(abs(high), 1e-9) * 0.1
    return Axis(low - room, high + room, is_log)


def draw_lines(title: str, lines: list[Line], axis: Axis, caption: str) -> str:
    """Draw lines as a figure with a legend, and describe them in text for screen readers.

    Args:
        title: What is drawn, with its unit.
        lines: Those without a point are not drawn.
        axis: The vertical axis.
        caption: What the plot shows.
    """
    lines = [line for line in lines if line.points]
    first = min((line.points[0][0] for line in lines), default=0.0)
    last = max((line.points[-1][0] for line in lines), default=1.0)
    outside = sum(not axis.low <= y <= axis.high for line in lines for _, y in line.points)
    notes = [caption, "Logarithmic axis." if axis.is_log else ""]
    notes += [f"Outlying points, drawn on its edge: {outside}."] if outside else []
    drawn = "".join(
        _draw_line(line, number, axis, first, last) for number, line in enumerate(lines)
    )
    legend = "".join(_render_key(line, number) for number, line in enumerate(lines))
    ends = "; ".join(
        f"{line.name} from {format_value(line.points[0][1])} to {format_value(line.points[-1][1])}"
        for line in lines
    )
    text = escape_html(f"{title}, steps {first:,.0f} to {last:,.0f}: {ends}.")
    return (
        f"<figure><h3>{escape_html(title)}</h3>\n"
        f'<svg class="plot" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{text}">'
        f"{_draw_axes(axis, first, last)}{drawn}</svg>\n"
        f'<ul class="legend">{legend}</ul>'
        f"<figcaption>{escape_html(' '.join(note for note in notes if note))}</figcaption></figure>"
    )


def _draw_line(line: Line, number: int, axis: Axis, first: float, last: float) -> str:
    points = " ".join(
        f"{_place_x(step, first, last):.1f},{_place_y(axis, value):.1f}"
        for step, value in line.points
    )
    if len(line.points) == 1:
        x, y = points.split(",")
        return f'<circle cx="{x}" cy="{y}" r="3" style="--c:{_colour(line, number)}"/>'
    dash = DASHES[number % len(DASHES)]
    return (
        f'<polyline points="{points}" stroke-dasharray="{dash}" '
        f'style="--c:{_colour(line, number)}"/>'
    )


def _colour(line: Line, number: int) -> str:
    return OWN_COLOURS.get(line.name, SOURCE_COLOURS[number % len(SOURCE_COLOURS)])


def _render_key(line: Line, number: int) -> str:
    dash = DASHES[number % len(DASHES)]
    sample = (
        f'<svg width="30" height="10" aria-hidden="true"><polyline points="0,5 30,5" '
        f'stroke-dasharray="{dash}" style="--c:{_colour(line, number)}"/></svg>'
    )
    last = format_value(line.points[-1][1])
    return f"<li>{sample}{escape_html(line.name)} <b>{last}</b></li>"


def _draw_axes(axis: Axis, first: float, last: float) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts: list[str] = []
    for tick in axis.list_ticks():
        y = _place_y(axis, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{format_value(tick)}</text>'
        )
    for step, anchor in ((first, "start"), (last, "end")):
        x = _place_x(step, first, last)
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="{anchor}">step {step:,.0f}</text>'
        )
    return "".join(parts)


def _place_x(step: float, first: float, last: float) -> float:
    share = (step - first) / (last - first) if last > first else 0.5
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _place_y(axis: Axis, value: float) -> float:
    return TOP + (1 - axis.place(value)) * (HEIGHT - TOP - BOTTOM)


def format_value(value: float) -> str:
    """Format a number with about three digits."""
    if value == 0 or 0.001 <= abs(value) < 10_000:
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:.1e}"
