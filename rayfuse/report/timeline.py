"""Commits of captured shards -> a picture of when each worker's device computed and waited."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from rayfuse.report.style import FAINT, INK, new_figure, plain, style_of, to_png
from rayfuse.storage.dataset import DataSet

MAX_SHUFFLE_STREAMS = 40
"""Workers in the picture: those that computed longest."""

LONG_PAUSE = 0.05
"""Of all working time: pauses of everybody that are longer than this share are left out."""


UNITS = ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


@dataclass(frozen=True)
class ShardSpan:
    """One shard in the hands of a worker."""

    worker: str
    began: float
    """When the device started on it: seconds of the worker's clock, since 1970."""
    busy_seconds: float
    idle_seconds: float
    """That the device had waited before."""
    tokens: int

    @property
    def ended(self) -> float:
        """When the device was done with it."""
        return self.began + self.busy_seconds


def read_spells(captured: DataSet) -> list[ShardSpan]:
    """Return who captured which shard when, in order of time."""
    spells = [
        ShardSpan(
            commit.worker,
            commit.stats["began"],
            commit.stats["busy_seconds"],
            commit.stats["idle_seconds"],
            commit.tokens,
        )
        for commit in captured.commits().values()
        if "began" in commit.stats
    ]
    return sorted(spells, key=lambda spell: (spell.began, spell.worker))


def sum_busy(spells: list[ShardSpan]) -> float:
    """Return the seconds that devices computed, never 0."""
    return max(sum(spell.busy_seconds for spell in spells), 1e-9)


def share_waited(spells: list[ShardSpan]) -> float:
    """Return the share of the workers' time in which their devices waited."""
    waited = sum(spell.idle_seconds for spell in spells)
    return waited / (waited + sum_busy(spells))


def draw_timeline(spells: dict[str, list[ShardSpan]]) -> bytes:
    """Return a lane for each worker, coloured by its source where the device computed.

    Args:
        spells: By source; one at least has some.
    """
    lanes = _split_lanes(spells)
    shown = sorted(lanes, key=lambda key: -sum_busy(lanes[key]))[:MAX_SHUFFLE_STREAMS]
    shown.sort(key=lambda key: (list(spells).index(key[0]), lanes[key][0].began))
    pauses = find_pauses([spell for key in shown for spell in lanes[key]])
    seconds = max(leave_out(np.array([s.ended for key in shown for s in lanes[key]]), pauses))
    scale, unit = next((scale, unit) for scale, unit in UNITS if seconds >= 3 * scale or scale == 1)
    figure, (axes,) = new_figure(1.5 + 0.3 * len(shown), rows=1)
    number: dict[str, int] = {}
    titles: list[str] = []
    for at, key in enumerate(shown):
        lane = lanes[key]
        number[key[0]] = number.get(key[0], 0) + 1
        titles.append(f"{plain(key[0], 16)} {number[key[0]]}")
        starts = leave_out(np.array([spell.began for spell in lane]), pauses) / scale
        ends = leave_out(np.array([spell.ended for spell in lane]), pauses) / scale
        waits = starts - np.array([spell.idle_seconds for spell in lane]) / scale
        first = max(waits.min(), 0.0)
        axes.barh(at, ends.max() - first, 0.62, first, color=FAINT)
        style = style_of(key[0], list(spells))
        axes.barh([at] * len(lane), ends - starts, 0.62, starts, **style, linewidth=0)
    for cut in leave_out(np.array([start for start, _ in pauses]), pauses)[1:]:
        axes.axvline(cut / scale, color=INK, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(shown)), titles)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{unit} since the first worker asked for work")
    is_cut = f", the {len(shown)} busiest of {len(lanes)} workers" * (len(shown) < len(lanes))
    axes.set_title(f"Capturing: coloured the device computed, grey it waited{is_cut}")
    shares = axes.secondary_yaxis("right")
    busy = [f"{1 - share_waited(lanes[key]):.0%} busy" for key in shown]
    shares.set_yticks(range(len(shown)), busy)
    shares.tick_params(length=0)
    shares.spines["right"].set_visible(False)
    return to_png(figure)


def _split_lanes(spells: dict[str, list[ShardSpan]]) -> dict[tuple[str, str], list[ShardSpan]]:
    lanes: dict[tuple[str, str], list[ShardSpan]] = {}
    for source, each in spells.items():
        for spell in each:
            lanes.setdefault((source, spell.worker), []).append(spell)
    return lanes


def find_pauses(spells: list[ShardSpan]) -> list[tuple[float, float]]:
    """Return the times to leave out: from 0 to the first worker's start, then when nobody worked.

    A job that was stopped and started again next day has such a pause.
    """
    ordered = sorted(spells, key=lambda spell: spell.began - spell.idle_seconds)
    spans = [(spell.began - spell.idle_seconds, spell.ended) for spell in ordered]
    total = sum(end - start for start, end in spans)
    pauses = [(0.0, spans[0][0])]
    reached = spans[0][1]
    for (_, end), (start, later_end) in pairwise(spans):
        reached = max(reached, end)
        if start - reached > LONG_PAUSE * total:
            pauses.append((reached, start))
        reached = max(reached, later_end)
    return pauses


def leave_out(
    times: Float[np.ndarray, " times"], pauses: list[tuple[float, float]]
) -> Float[np.ndarray, " times"]:
    """Return times on a clock that stands still during pauses."""
    passed = sum(np.clip(times - start, 0, end - start) for start, end in pauses)
    return times - passed
