"""The study's plots: every difference with its interval, distinguished by position and marker."""

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.fusion.findings import Findings
from benchmarks.fusion.intervals import Interval
from benchmarks.fusion.plan import CLM, FUSED, LAMBDAS, TARGET_ALONE
from benchmarks.fusion.planner import TOP_KS
from benchmarks.fusion.scales import DOMAINS
from benchmarks.fusion.tables import Records, order_models
from rayfuse.evaluate.scores import ALL
from rayfuse.report.style import INK, new_figure, put_legend_inside, put_legend_outside, to_png

OUTCOMES = {"better": ("#0072B2", "o"), "worse": ("#D55E00", "X"), "unclear": ("#8C8C8C", "s")}
"""Color and marker of each outcome."""

MARKERS = "osD^vPX*<>"

NO_VARIANTS = ("untrained", "weak target", "weak target: CLM", "weak target: fused")
"""Entries of question 8 that do not continue the common target."""

MINUS_CLM = "minus CLM, bits per byte (left of 0: better)"

NEAR = 0.05
"""Differences up to this size are drawn on a linear scale if there are outliers."""

LOGARITHMIC = f"logarithmic beyond ±{NEAR:g}"


def draw_plots(findings: Findings) -> dict[str, bytes]:
    """Draw the plots of all finished variants, by file name."""
    questions = findings.questions
    clm, fused = questions["1"].get(CLM), questions["1"].get(FUSED)
    if clm is None or fused is None:
        return {}
    found = {
        "models.png": draw_models(findings),
        "domains.png": draw_intervals(
            "Fused minus CLM, by domain", findings.compare(fused, clm), "fused " + MINUS_CLM
        ),
        "variants.png": draw_variants(findings, clm),
        "lambda.png": draw_lambda(findings, clm),
        "top_k.png": draw_top_k(findings, clm),
    }
    if any(name.endswith("x") for name in questions["2"]):
        found["tokens.png"] = draw_tokens(findings)
    return found


def draw_models(findings: Findings) -> bytes:
    """Plot bits per byte of every model of question 1, one column per domain."""
    figure, (axes,) = new_figure(4.6, rows=1)
    models = order_models(findings)
    groups = (ALL, *DOMAINS)
    for index, (name, records) in enumerate(models.items()):
        scores = findings.score(records)
        at = np.arange(len(groups)) + (index - len(models) / 2) * 0.09
        axes.plot(at, [scores[group] for group in groups], linestyle="none", markersize=7,
                  marker=MARKERS[index % len(MARKERS)], label=name)  # fmt: skip
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlabel("held-out text, by domain")
    axes.set_ylabel("bits per byte (lower is better)")
    axes.set_title("Bits per byte of each model, mean over seeds")
    put_legend_outside(axes, 4)
    return to_png(figure)


def draw_intervals(title: str, intervals: dict[str, Interval], label: str) -> bytes:
    """Plot the 95 % intervals, one line per name."""
    figure, (axes,) = new_figure(1.5 + 0.34 * len(intervals), rows=1)
    _put_intervals(axes, intervals)
    axes.set_title(f"{title} (95 % intervals)")
    is_far = _scale_outliers(axes, "x", intervals.values())
    axes.set_xlabel(f"{label}; {LOGARITHMIC}" if is_far else label)
    put_legend_inside(axes)
    return to_png(figure)


def draw_variants(findings: Findings, clm: Records) -> bytes:
    """Plot all variants of questions 3 to 8 minus CLM."""
    lines: dict[str, Interval] = {}
    for question in ("3", "4", "5", "6", "7", "8"):
        for name, records in findings.questions[question].items():
            if records != clm and name not in NO_VARIANTS:
                lines[f"{question}: {name}"] = findings.compare(records, clm)[ALL]
    return draw_intervals("All variants, by question", lines, MINUS_CLM)


def draw_lambda(findings: Findings, clm: Records) -> bytes:
    """Plot bits per byte minus CLM against lambda."""
    variants = findings.questions["7"]
    points = {
        weight: findings.compare(variants[f"lambda {weight:g}"], clm)[ALL]
        for weight in sorted(LAMBDAS)
        if f"lambda {weight:g}" in variants
    }
    points[1.0] = Interval(0.0, 0.0, 0.0)
    figure, (axes,) = new_figure(3.8, rows=1)
    _put_curve(axes, points, "fused, forward KL", marker="o", linestyle="-")
    axes.axhline(0, color=INK, linewidth=1, linestyle=":")
    axes.set_xlabel("lambda (share of the text's own loss; 1 is CLM)")
    is_far = _scale_outliers(axes, "y", points.values())
    axes.set_ylabel("minus CLM, bits per byte" + f"\n({LOGARITHMIC})" * is_far)
    axes.set_title("Weight of the text against the sources (95 % intervals)")
    return to_png(figure)


def draw_top_k(findings: Findings, clm: Records) -> bytes:
    """Plot bits per byte minus CLM against k, beside other records and other tails."""
    variants = findings.questions["6"]
    figure, (axes,) = new_figure(4.2, rows=1)
    points = {
        float(top_k): findings.compare(variants[f"top-{top_k}, bucket"], clm)[ALL]
        for top_k in TOP_KS
        if f"top-{top_k}, bucket" in variants
    }
    _put_curve(axes, points, "top k, tail as one bucket", marker="o", linestyle="-")
    others = [name for name in variants if name != CLM and not name.endswith("bucket")]
    for index, name in enumerate(others, 1):
        value = findings.compare(variants[name], clm)[ALL]
        at = 16 * (1 + 0.06 * index) if name != "full distributions" else 110
        _put_point(axes, at, value, name, MARKERS[index % len(MARKERS)])
    axes.axhline(0, color=INK, linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks([*TOP_KS, 110], [*(str(top_k) for top_k in TOP_KS), "full"])
    axes.set_xlabel("entries per position (other records of equal size are next to 16)")
    axes.set_ylabel("minus CLM, bits per byte")
    axes.set_title("Entries stored per distribution (95 % intervals)")
    put_legend_outside(axes, 3)
    return to_png(figure)


def draw_tokens(findings: Findings) -> bytes:
    """Plot CLM's bits per byte against its tokens, with fusion as a reference."""
    variants = findings.questions["2"]
    tokens = np.mean([record["tokens"] for record in findings.needs["corpus"]
                      if record["name"].startswith("1x")])  # fmt: skip
    names = {1: CLM} | {times: f"CLM {times}x" for times in findings.scale.multiples}
    points = {
        times * tokens: findings.score(variants[name])[ALL]
        for times, name in names.items()
        if name in variants
    }
    fused = findings.score(variants[FUSED])[ALL]
    figure, (axes,) = new_figure(3.8, rows=1)
    axes.plot(list(points), list(points.values()), marker="s", linestyle="-", label="CLM")
    axes.plot([tokens], [fused], marker="*", markersize=13, linestyle="none", label="fused")
    axes.axhline(fused, linestyle="--", linewidth=1, color=INK)
    if TARGET_ALONE in findings.questions["1"]:
        start = findings.score(findings.questions["1"][TARGET_ALONE])[ALL]
        axes.axhline(start, linestyle=":", linewidth=1, color=INK)
        axes.annotate("target before", (tokens, start), textcoords="offset points", xytext=(0, 4))
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(points), [f"{at / 1000:,.0f} thousand" for at in points])
    axes.minorticks_off()
    axes.set_xlabel("target tokens (each run has a complete schedule of its own)")
    axes.set_ylabel("bits per byte, all (lower is better)")
    axes.set_title("Tokens with which CLM reaches the loss of fusion")
    put_legend_outside(axes, 2)
    return to_png(figure)


def _scale_outliers(axes: Any, name: Literal["x", "y"], intervals: Iterable[Interval]) -> bool:
    """Make an axis, `x` or `y`, logarithmic far from zero if there are outliers."""
    if max(max(abs(interval.low), abs(interval.high)) for interval in intervals) < 4 * NEAR:
        return False
    set_scale, axis = (
        (axes.set_xscale, axes.xaxis) if name == "x" else (axes.set_yscale, axes.yaxis)
    )
    set_scale("symlog", linthresh=NEAR, linscale=2)
    far = (0.025, 0.05, 0.1, 0.3, 1, 3)
    axis.set_major_locator(FixedLocator([*(-tick for tick in far), 0, *far]))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())
    return True


def _put_intervals(axes: Any, intervals: dict[str, Interval]) -> None:
    seen: set[str] = set()
    for at, interval in enumerate(intervals.values()):
        color, marker = OUTCOMES[interval.outcome]
        label = None if interval.outcome in seen else interval.outcome
        seen.add(interval.outcome)
        axes.plot([interval.low, interval.high], [at, at], color=color, linewidth=2.5, alpha=0.6)
        axes.plot(interval.value, at, color=color, marker=marker, markersize=7,
                  linestyle="none", label=label)  # fmt: skip
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(intervals)), list(intervals))
    axes.set_ylim(len(intervals) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def _put_curve(
    axes: Any, points: dict[float, Interval], label: str, *, marker: str, linestyle: str
) -> None:
    values = [point.value for point in points.values()]
    reach = [
        [point.value - point.low for point in points.values()],
        [point.high - point.value for point in points.values()],
    ]
    axes.errorbar(list(points), values, yerr=reach, marker=marker, linestyle=linestyle,
                  capsize=3, label=label)  # fmt: skip


def _put_point(axes: Any, at: float, value: Interval, label: str, marker: str) -> None:
    reach = [[value.value - value.low], [value.high - value.value]]
    axes.errorbar([at], [value.value], yerr=reach, marker=marker, linestyle="none", capsize=3,
                  markersize=7, label=label)  # fmt: skip
