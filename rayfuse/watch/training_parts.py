"""The parts of the page about trainings: numbers and plots."""

from collections.abc import Iterable
from typing import Any

from rayfuse.config.text import escape_html
from rayfuse.report.page import format_seconds
from rayfuse.watch.plots import Axis, Line, choose_axis, draw_lines, format_value
from rayfuse.watch.progress import render_table
from rayfuse.watch.snapshot import Snapshot
from rayfuse.watch.trainings import TrainingState, average

MAX_POINTS = 80
"""Points of a line; each is the mean of as many steps as that takes."""

PLOTS = {
    "clm_loss": ("CLM loss, nats per token", "Lower is better."),
    "fusion_loss": ("Fusion loss, nats per position", "Divergence from the fused sources."),
    "bits_per_byte": ("Bits per byte on held-out rows", "Of each validation; lower is better."),
}
"""Title and caption of a plot by its key in metrics.jsonl. All have a logarithmic axis."""


def render_trainings(snapshot: Snapshot) -> str:
    """Render a row for each training with its newest numbers."""
    rows = [_describe_run(run) for run in snapshot.trainings]
    header = [
        *("run", "steps", "state", "CLM loss", "fusion loss", "lambda", "learning rate"),
        *("held-out bits per byte", "tokens/s", "time left"),
    ]
    return render_table("training", header, rows)


def _describe_run(run: TrainingState) -> list[str]:
    total = "?" if run.num_steps is None else f"{run.num_steps:,}"
    speed, left = run.tokens_per_second, run.seconds_left
    return [
        run.name,
        f"{run.steps:,} of {total}",
        escape_html(_describe_state(run)),
        *(_show(run.last(key)) for key in ("clm_loss", "fusion_loss", "clm_weight")),
        _show(run.last("learning_rate")),
        _show(run.last("bits_per_byte")),
        "" if speed is None else f"{speed:,.0f}",
        "" if left is None else f"about {format_seconds(left)}",
    ]


def _describe_state(run: TrainingState) -> str:
    if run.is_complete:
        return "complete"
    if run.holder is None:
        return "stopped" if run.steps else "not started"
    return f"{run.holder} is silent" if run.is_holder_silent else f"trained by {run.holder}"


def _show(value: float | None) -> str:
    return "" if value is None else format_value(value)


def render_plots(snapshot: Snapshot) -> str:
    """Render the losses, lambda and the sources' shares over the steps."""
    runs = [run for run in snapshot.trainings if run.records]
    if not runs:
        return '<p class="note">No step is stored yet.</p>\n'
    figures = [_draw_losses(runs, key, title, caption) for key, (title, caption) in PLOTS.items()]
    fused = next((run for run in runs if run.name == "fused"), None)
    if fused is not None:
        figures += [_draw_lambda(fused), _draw_shares(fused)]
    stride = max(-(-len(run.records) // MAX_POINTS) for run in runs)
    note = f'<p class="note">Each point is the mean of {stride:,} steps.</p>\n' * (stride > 1)
    return f'<div class="plots">{"".join(figures)}</div>\n{note}'


def _draw_losses(runs: list[TrainingState], key: str, title: str, caption: str) -> str:
    lines = [Line(run.name, [*average(run.records, key, MAX_POINTS)]) for run in runs]
    if not any(line.points for line in lines):
        return ""
    return draw_lines(title, lines, choose_axis(_list_values(lines), is_log=True), caption)


def _list_values(lines: Iterable[Line]) -> list[float]:
    return [value for line in lines for _, value in line.points]


def _draw_lambda(run: TrainingState) -> str:
    line = Line("lambda", [*average(run.records, "clm_weight", MAX_POINTS)])
    caption = "Share of the text's own loss; the rest is that of the sources."
    return draw_lines("lambda", [line], Axis(0.0, 1.0, False), caption)


def _draw_shares(run: TrainingState) -> str:
    """Draw the share of positions at which each source is selected."""
    records = [record for record in run.records if record.get("source_shares")]
    sources = sorted({name for record in records for name in record["source_shares"]})
    if not sources:
        return ""
    lines = [
        Line(source, [*average(_pick(records, source), "share", MAX_POINTS)]) for source in sources
    ]
    caption = "Of the positions with a signal, those at which each source has the lowest cost."
    return draw_lines("Share of each selected source", lines, Axis(0.0, 1.0, False), caption)


def _pick(records: list[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    return [
        {"step": record["step"], "share": record["source_shares"].get(source, 0.0)}
        for record in records
    ]
