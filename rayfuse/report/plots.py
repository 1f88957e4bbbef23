"""The results of a run -> PNG plots, shown 900 pixels wide and stored at twice that."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from rayfuse.evaluate.bootstrap import Difference
from rayfuse.evaluate.scores import ALL, Evaluation, bits_per_byte, count_bytes
from rayfuse.report.colours import OWN_COLOURS
from rayfuse.report.gather import Curve, Findings, SourceSelection, SourceSignal
from rayfuse.report.style import (
    INK,
    new_figure,
    plain,
    put_legend_below,
    put_legend_inside,
    put_legend_outside,
    style_of,
    to_png,
)
from rayfuse.report.timeline import draw_timeline
from rayfuse.report.verdict import format_signed, name_domain, order_names

MAX_GROUPS = 10
"""Groups of documents in a plot: the largest; the table has all."""

MAX_VALUES = 24
"""Bars up to which their values are printed; the table has them in any case."""


def draw_plots(findings: Findings) -> dict[str, bytes]:
    """Draw the report's plots, by name; those without data are missing."""
    evaluations = findings.evaluations
    plots = {
        "bits_per_byte": draw_bits_per_byte(evaluations),
        "differences": draw_differences(findings.differences),
    }
    if any(findings.task_differences.values()):
        plots["task_differences"] = draw_task_differences(findings.task_differences)
    if findings.curves:
        plots["training_curves"] = draw_training_curves(findings.curves)
    if findings.selection.counts:
        sources = list(next(iter(findings.selection.counts.values())))
        plots["source_selection"] = draw_source_selection(findings.selection, sources)
    if findings.signals:
        plots["alignment"] = draw_alignment(findings.signals)
    if any(findings.spans.values()):
        plots["timeline"] = draw_timeline(findings.spans)
    return plots


def draw_bits_per_byte(evaluations: dict[str, Evaluation]) -> bytes:
    """Draw bars of bits per byte, grouped by domain, one bar per model."""
    scores = {name: bits_per_byte(model.documents) for name, model in evaluations.items()}
    groups, is_cut = _choose_groups(evaluations)
    sources = [name for name, model in evaluations.items() if model.role == "source"]
    figure, (axes,) = new_figure(4.4, rows=1)
    width = 0.84 / len(scores)
    has_values = len(groups) * len(scores) <= MAX_VALUES
    for index, (name, values) in enumerate(scores.items()):
        at = np.arange(len(groups)) - 0.42 + width * (index + 0.5)
        heights = [values[group] for group in groups]
        bars = axes.bar(at, heights, width * 0.92, label=plain(name), **style_of(name, sources))
        if has_values:
            rotation = 0 if len(groups) * len(scores) <= 12 else 90
            axes.bar_label(bars, fmt="%.3f", fontsize=8, padding=2, rotation=rotation)
    axes.set_xticks(range(len(groups)), [plain(name_domain(group)) for group in groups])
    if max(len(plain(name_domain(group))) for group in groups) > 100 / len(groups):
        axes.tick_params(axis="x", rotation=25)
        for label in axes.get_xticklabels():
            label.set(horizontalalignment="right", rotation_mode="anchor")
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("bits per byte (lower is better)")
    axes.margins(y=0.2 if has_values else 0.06)
    axes.set_title("Held-out text: bits per byte of each model" + (" (largest domains)" * is_cut))
    put_legend_outside(axes, len(scores))
    return to_png(figure)


def draw_differences(differences: dict[str, dict[str, Difference]]) -> bytes:
    """Draw fused minus each other model as points with 95 % intervals; left of 0 is better."""
    names = order_names(differences)
    lines = [(f"{name}, all text", differences[name][ALL]) for name in names]
    domains = [group for group in differences.get("clm", {}) if group != ALL]
    if 1 < len(domains) <= 2 * MAX_GROUPS:
        lines += [(f"clm, {name_domain(name)}", differences["clm"][name]) for name in domains]
    return _draw_intervals(
        lines,
        "fused minus other, bits per byte (left of 0: fused is better)",
        "Differences with 95 % intervals (grey square: no clear difference)",
    )


def draw_task_differences(differences: dict[str, dict[str, Difference]]) -> bytes:
    """Draw how much better fused is at each task than the baseline, with 95 % intervals.

    Args:
        differences: By task, then by the model that fused is compared with; at least one.
    """
    other = order_names({name: None for others in differences.values() for name in others})[0]
    lines = [
        (task, _orient(others[other])) for task, others in differences.items() if other in others
    ]
    return _draw_intervals(
        lines,
        "gain of fused in the task's own metric (right of 0: fused is better)",
        f"Tasks, fused against {plain(other)}, 95 % intervals (grey square: no clear difference)",
    )


def _orient(difference: Difference) -> Difference:
    """Negate a difference if lower is better, so that higher is."""
    if difference.higher_is_better:
        return difference
    return replace(
        difference,
        difference=-difference.difference,
        low=-difference.high,
        high=-difference.low,
        higher_is_better=True,
    )


def _draw_intervals(lines: list[tuple[str, Difference]], label: str, title: str) -> bytes:
    """Draw differences as points with their intervals; marker and colour show the outcome."""
    figure, (axes,) = new_figure(1.4 + 0.34 * len(lines), rows=1)
    for at, (_, difference) in enumerate(lines):
        colour = {"better": "#0072B2", "worse": "#D55E00", "unclear": "#8C8C8C"}[difference.outcome]
        marker = {"better": "o", "worse": "X", "unclear": "s"}[difference.outcome]
        if np.isfinite(difference.low):
            axes.plot(
                [difference.low, difference.high], [at, at], color=colour, linewidth=3, alpha=0.6
            )
        axes.plot(difference.difference, at, color=colour, marker=marker, markersize=7)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(lines)), [plain(title, 34) for title, _ in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    axes.set_xlabel(label)
    axes.set_title(title)
    values = axes.secondary_yaxis("right")
    values.set_yticks(
        range(len(lines)), [format_signed(difference.difference) for _, difference in lines]
    )
    values.tick_params(length=0)
    values.spines["right"].set_visible(False)
    return to_png(figure)


def draw_training_curves(curves: dict[str, Curve]) -> bytes:
    """Draw the CLM loss of every run, the gap between fused and CLM, and the fusion loss."""
    gap = _measure_gap(curves)
    fusion = {name: curve for name, curve in curves.items() if np.isfinite(curve.fusion_loss).any()}
    panels = 1 + (gap is not None) + bool(fusion)
    figure, rows = new_figure(1.6 + 2.1 * panels, rows=panels)
    window = max(smoothing_window(len(curve.steps)) for curve in curves.values())
    smoothing = f"mean of the last {window} steps" if window > 1 else "each step"
    rows[0].set_title(f"Training loss on the text (line: {smoothing}; faint: each step)")
    rows[0].set_ylabel("CLM loss\n(nats per token)")
    for name, curve in curves.items():
        _draw_line(rows[0], curve.tokens, curve.clm_loss, name, window)
    put_legend_inside(rows[0])
    if gap is not None:
        tokens, values = gap
        rows[1].set_title("Fused minus CLM on the same rows (below 0: fused fits the text better)")
        rows[1].set_ylabel("difference\n(nats per token)")
        rows[1].axhline(0, color=INK, linewidth=1)
        _draw_line(rows[1], tokens, values, "difference", window)
    if fusion:
        rows[-1].set_title("Fusion loss: distance of the target from the fused distributions")
        rows[-1].set_ylabel("fusion loss\n(nats per position)")
        for name, curve in fusion.items():
            _draw_line(rows[-1], curve.tokens, curve.fusion_loss, name, window)
    rows[-1].set_xlabel("target tokens learned")
    for axes in rows:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return to_png(figure)


def draw_source_selection(selection: SourceSelection, sources: Sequence[str]) -> bytes:
    """Return, for each domain, the share of rows that each source selection."""
    totals = {domain: sum(row.values()) for domain, row in selection.counts.items()}
    largest = sorted((d for d in totals if totals[d]), key=lambda domain: -totals[domain])
    domains = sorted(largest[: 2 * MAX_GROUPS])
    figure, (axes,) = new_figure(1.7 + 0.38 * len(domains), rows=1)
    left = np.zeros(len(domains))
    for name in sources:
        shares = np.array([selection.counts[domain][name] / totals[domain] for domain in domains])
        bars = axes.barh(
            range(len(domains)), shares, 0.72, left, label=plain(name), **style_of(name, sources)
        )
        labels = [f"{share:.0%}" if share >= 0.06 else "" for share in shares]
        axes.bar_label(bars, labels, label_type="center", fontsize=9, color="black")
        left = left + shares
    names = [f"{plain(name_domain(domain))} ({totals[domain]:,} rows)" for domain in domains]
    axes.set_yticks(range(len(domains)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("share of rows with the lowest NLL per byte")
    is_cut = selection.shards_read < selection.num_shards
    part = f", first {selection.shards_read} of {selection.num_shards} shards" if is_cut else ""
    axes.set_title(f"Source with the lowest NLL, by domain{part}")
    put_legend_outside(axes, len(sources))
    return to_png(figure)


def draw_alignment(signals: dict[str, SourceSignal]) -> bytes:
    """Draw, for each source, the share of positions with a signal and the mean tail mass."""
    sources = list(signals)
    figure, (left, right) = new_figure(1.9 + 0.42 * len(sources), rows=1, columns=2)
    at = np.arange(len(sources))
    shares = [signals[name].share for name in sources]
    bars = left.barh(at, shares, 0.6, color=[style_of(name, sources)["color"] for name in sources])
    left.bar_label(bars, [f"{share:.1%}" for share in shares], padding=4, fontsize=9)
    left.set_title("Target positions with a signal")
    left.set_xlabel("share of target positions")
    left.set_xlim(0, 1.18)
    left.set_xticks(np.arange(0, 1.01, 0.25))
    own = [signals[name].captured_tail_mass for name in sources]
    has_own = all(mass is not None for mass in own)
    mapped = [signals[name].tail_mass for name in sources]
    _draw_tail(right, at - 0.17 * has_own, mapped, "in the target's tokens", INK)
    if has_own:
        values = [mass for mass in own if mass is not None]
        _draw_tail(right, at + 0.17, values, "in the source's own tokens", "#A6A6A6")
        put_legend_below(right)
    right.set_title("Mean mass outside the top k (tail)")
    right.set_xlabel("probability")
    right.margins(x=0.22)
    for axes in (left, right):
        axes.set_yticks(at, [plain(name) for name in sources])
        axes.set_ylim(len(sources) - 0.4, -0.6)
        axes.xaxis.set_major_locator(
            MaxNLocator(4, steps=[1, 2, 2.5, 5])
        )  # else 0.00% and 0.10% touch
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(axis="y", visible=False)
    return to_png(figure)


def smoothing_window(num_steps: int) -> int:
    """Choose the number of steps to average for a smoothed loss: one in forty."""
    return max(1, num_steps // 40)


def smooth(values: Float[np.ndarray, " steps"], window: int) -> Float[np.ndarray, " steps"]:
    """Average each step with those before it, `window` in all; NaN are skipped."""
    is_there = np.isfinite(values)
    sums = np.cumsum(np.concatenate([[0.0], np.where(is_there, values, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], is_there]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    number = counts[ends] - counts[starts]
    means = np.full(len(values), np.nan)
    np.divide(sums[ends] - sums[starts], number, out=means, where=number > 0)
    return means


def _measure_gap(
    curves: dict[str, Curve],
) -> tuple[np.ndarray, Float[np.ndarray, " steps"]] | None:
    """Subtract CLM from fused step by step; None unless both runs have the same steps."""
    fused, clm = curves.get("fused"), curves.get("clm")
    if fused is None or clm is None or not np.array_equal(fused.tokens, clm.tokens):
        return None
    return fused.tokens, fused.clm_loss - clm.clm_loss


def _choose_groups(evaluations: dict[str, Evaluation]) -> tuple[list[str], bool]:
    """Choose the groups to show, `all` first, and check whether others are hidden."""
    sizes = count_bytes(next(iter(evaluations.values())).documents)
    domains = [group for group in sizes if group != ALL]
    if len(domains) == 1:
        return [ALL], False
    largest = sorted(domains, key=lambda group: -sizes[group])[: MAX_GROUPS - 1]
    return [ALL, *sorted(largest)], len(largest) < len(domains)


def _draw_line(axes: Axes, tokens: np.ndarray, values: np.ndarray, name: str, window: int) -> None:
    colour = OWN_COLOURS.get(name, INK)
    if window > 1:
        axes.plot(tokens, values, color=colour, alpha=0.22, linewidth=0.7)
    line = smooth(values, window) if window > 1 else values
    axes.plot(tokens, line, color=colour, linewidth=1.8, label=plain(name))


def _draw_tail(axes: Axes, at: np.ndarray, values: list[float], label: str, colour: str) -> None:
    bars = axes.barh(at, values, 0.32, color=colour, label=label)
    axes.bar_label(bars, [f"{value:.1%}" for value in values], padding=4, fontsize=9)
