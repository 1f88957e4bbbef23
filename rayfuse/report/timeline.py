"""A plot of when each worker's device was busy and idle during capture."""

from itertools import pairwise

import numpy as np
from jaxtyping import Float

from rayfuse.report.spans import ShardSpan, share_waited, sum_busy
from rayfuse.report.style import FAINT, INK, new_figure, plain, style_of, to_png

MAX_WORKERS = 40
"""Workers in the plot: those that computed longest."""

LONG_PAUSE = 0.05
"""A share of all working time: longer pauses of all workers at once are skipped."""

UNITS = ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def draw_timeline(spans: dict[str, list[ShardSpan]]) -> bytes:
    """Draw a row for each worker, in its source's colour while the device was busy.

    Args:
        spans: By source; at least one source has some.
    """
    workers = _split_workers(spans)
    shown = sorted(workers, key=lambda key: -sum_busy(workers[key]))[:MAX_WORKERS]
    shown.sort(key=lambda key: (list(spans).index(key[0]), workers[key][0].began))
    pauses = find_pauses([span for key in shown for span in workers[key]])
    seconds = max(skip_pauses(np.array([s.ended for key in shown for s in workers[key]]), pauses))
    scale, unit = next((scale, unit) for scale, unit in UNITS if seconds >= 3 * scale or scale == 1)
    figure, (axes,) = new_figure(1.5 + 0.3 * len(shown), rows=1)
    number: dict[str, int] = {}
    titles: list[str] = []
    for at, key in enumerate(shown):
        shards = workers[key]
        number[key[0]] = number.get(key[0], 0) + 1
        titles.append(f"{plain(key[0], 16)} {number[key[0]]}")
        starts = skip_pauses(np.array([span.began for span in shards]), pauses) / scale
        ends = skip_pauses(np.array([span.ended for span in shards]), pauses) / scale
        waits = starts - np.array([span.idle_seconds for span in shards]) / scale
        first = max(waits.min(), 0.0)
        axes.barh(at, ends.max() - first, 0.62, first, color=FAINT)
        style = style_of(key[0], list(spans))
        axes.barh([at] * len(shards), ends - starts, 0.62, starts, **style, linewidth=0)
    for cut in skip_pauses(np.array([start for start, _ in pauses]), pauses)[1:]:
        axes.axvline(cut / scale, color=INK, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(shown)), titles)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{unit} since the first worker started")
    is_cut = f", the {len(shown)} busiest of {len(workers)} workers" * (len(shown) < len(workers))
    axes.set_title(f"Capture: busy devices coloured, idle grey{is_cut}")
    shares = axes.secondary_yaxis("right")
    busy = [f"{1 - share_waited(workers[key]):.0%} busy" for key in shown]
    shares.set_yticks(range(len(shown)), busy)
    shares.tick_params(length=0)
    shares.spines["right"].set_visible(False)
    return to_png(figure)


def _split_workers(spans: dict[str, list[ShardSpan]]) -> dict[tuple[str, str], list[ShardSpan]]:
    workers: dict[tuple[str, str], list[ShardSpan]] = {}
    for source, shards in spans.items():
        for span in shards:
            workers.setdefault((source, span.worker), []).append(span)
    return workers


def find_pauses(spans: list[ShardSpan]) -> list[tuple[float, float]]:
    """Find the times to skip: from 0 to the first worker's start, then long common pauses.

    A job that was stopped and resumed the next day has such a pause.
    """
    ordered = sorted(spans, key=lambda span: span.began - span.idle_seconds)
    times = [(span.began - span.idle_seconds, span.ended) for span in ordered]
    total = sum(end - start for start, end in times)
    pauses = [(0.0, times[0][0])]
    reached = times[0][1]
    for (_, end), (start, later_end) in pairwise(times):
        reached = max(reached, end)
        if start - reached > LONG_PAUSE * total:
            pauses.append((reached, start))
        reached = max(reached, later_end)
    return pauses


def skip_pauses(
    times: Float[np.ndarray, " times"], pauses: list[tuple[float, float]]
) -> Float[np.ndarray, " times"]:
    """Convert times to a clock that stands still during pauses."""
    passed = sum(np.clip(times - start, 0, end - start) for start, end in pauses)
    return times - passed
