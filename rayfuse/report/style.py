"""The common style of the report's plots: size, colours, legends and text."""

import io
import warnings
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rayfuse.config.text import show_on_one_line
from rayfuse.report.colours import OWN_COLOURS, OWN_HATCHES, SOURCE_COLOURS

WIDTH_INCHES = 9.0
PIXELS_PER_INCH = 200

INK, FAINT = "#222222", "#D9D9D9"


def style_of(name: str, sources: Sequence[str]) -> dict[str, Any]:
    """Choose a model's colour, the same in every plot, and a hatch if colours repeat."""
    if name in OWN_COLOURS:
        hatch = OWN_HATCHES.get(name)
        edge = {"hatch": hatch, "edgecolor": "white"} if hatch else {}
        return {"color": OWN_COLOURS[name]} | edge
    turn, index = divmod(sources.index(name), len(SOURCE_COLOURS))
    style = {"color": SOURCE_COLOURS[index]}
    return style | {"hatch": "/" * (2 * turn), "edgecolor": "white"} if turn else style


def plain(text: str, max_chars: int = 20) -> str:
    """Put text on one line, shorten it, and escape it for matplotlib."""
    line = show_on_one_line(text)
    short = line if len(line) <= max_chars else line[: max_chars - 1] + "\u2026"
    return short.replace("$", r"\$")


def new_figure(height: float, *, rows: int, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Make a white figure of a height in inches, and its axes row by row."""
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=PIXELS_PER_INCH, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=rows > 1)
    for axes in grid.flat:
        axes.set_axisbelow(True)
        axes.grid(color=FAINT, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#888888")
        axes.tick_params(color="#888888", labelcolor=INK)
    return figure, list(grid.flat)


def put_legend_outside(axes: Axes, num_labels: int) -> None:
    """Put the legend beneath the figure."""
    axes.figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(num_labels, 6),
        frameon=False,
        fontsize=9,
    )


def put_legend_inside(axes: Axes) -> None:
    """Put the legend into the upper right corner."""
    axes.legend(frameon=False, loc="upper right", fontsize=9)


def put_legend_below(axes: Axes) -> None:
    """Put the legend beneath its own axes."""
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=2)


def to_png(figure: Figure) -> bytes:
    """Draw a figure."""
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    with warnings.catch_warnings():
        # Characters missing from the font are drawn as boxes; the table beside the plot has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, format="png")
    return file.getvalue()
