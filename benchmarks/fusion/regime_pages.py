"""The regimes' page and picture, made from regimes.json alone."""

from collections.abc import Mapping
from typing import Any

from benchmarks.fusion.intervals import Interval
from benchmarks.fusion.tables import to_table, write_interval
from rayfuse.evaluate.scores import ALL
from rayfuse.report.style import INK, new_figure, put_legend_outside, to_png

SITUATIONS = {
    "R0": "the study's own: sources as strong as the target, 95 kB of text a domain",
    "R1": "little text, strong sources: 32 kB a domain, 2.6 times the size, 2M tokens",
    "R2": "as R1, with a target of an eighth of the pre-training",
    "R3": "as R1, and the sources write 1M tokens more, from beginnings of the text",
    "R4": "strong sources, ample text: 320 kB a domain",
    "tiny": "for tests",
}

TITLES = {
    "target": "untouched target",
    "best_source": "best source",
    "ensemble_mean": "ensemble, mean",
    "ensemble_filter": "ensemble, weighted by the text before",
    "clm": "CLM",
    "clm_written": "CLM, with the text that the sources wrote",
    "fused": "fused",
    "fused_unwritten": "fused, without the text that the sources wrote",
    "copy": "the target's own copy alone",
    "distilled": "one source alone",
    "defaults": "rayfuse's defaults before this study",
    "proposed": "what other defaults would give",
    "fusellm": "FuseLLM's published rule",
    "sum_kl": "sum of all sources' KL",
    "sum_kl_copy": "sum of all sources' KL and the copy's, at the best settings of fusion",
    "uld": "ULD or GOLD, from the source that is best in each row",
}

Regime = Mapping[str, Any]


def render_page(regimes: Mapping[str, Regime]) -> str:
    """Render the tables of all regimes as Markdown."""
    sections = [
        "# When fusion gains on CLM",
        "`python -m benchmarks.fusion.regimes --out DIR` computes all of this; bits per byte, "
        "lower is better. Of each role the variant with the lowest loss on the selection half of "
        "the first seed was chosen, and is reported on passages that no model was trained on and "
        "no choice was made on (of books, other chapters were; legal texts repeat each other's "
        "phrases). Intervals are 95 % over documents and, with several seeds, seeds, which decide "
        "the target, the corpus and the order; sources and split of the text are always the same.",
        "![bits per byte against text](regimes.png)",
    ]
    for name, regime in regimes.items():
        sections += _render_regime(name, regime)
    return "\n\n".join(sections) + "\n"


def _render_regime(name: str, regime: Regime) -> list[str]:
    seeds = regime["seeds"]
    head = ["model", "variant chosen", "seeds", "bits per byte", "fused minus it"]
    gaps = regime.get("fused_minus", {})
    lines = [
        [
            TITLES.get(role, f"CLM, {role.removeprefix('clm ')} the text"),
            regime["chosen"][role],
            str(regime["seeds_by_role"][role]),
            f"{regime[role]:.4f}",
            write_interval(Interval(**gaps[role][ALL])) if role in gaps else "",
        ]
        for role in regime["chosen"]
    ]
    parts = [
        f"## {name}: {SITUATIONS[name]}",
        f"Complete seeds: {seeds}. The column `seeds` is the number of each model's.",
        to_table(head, lines),
    ]
    if "gain" in regime:
        parts.append(_render_gain(regime))
    if "costs" in regime:
        parts += ["What it costs on other text:", _render_costs(regime["costs"])]
    ablations = [
        [role, variant, f"{score:.4f}", "chosen" * (regime["chosen"].get(role) == variant)]
        for role, scores in regime["selection"].items()
        if len(scores) > 1
        for variant, score in sorted(scores.items(), key=lambda item: item[1])
    ]
    table = to_table(["role", "variant", "selection half, bits per byte", ""], ablations)
    parts += ["All variants, first seed:", table]
    return parts


def _render_gain(regime: Regime) -> str:
    titles = {
        "gain": "gain on CLM",
        "absorption": "absorbed of the weighted ensemble",
        "absorption_of_mean": "absorbed of the mean ensemble",
    }
    lines = [
        [title, _write_share(regime[name]) if name in regime else "CLM is as good as the ensemble"]
        for name, title in titles.items()
    ]
    if "token_multiple" in regime:
        found = regime["token_multiple"]
        text = f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
        outside = "" if found["is_inside_curve"] else "; its upper end is extrapolated"
        lines.append(["times the text that CLM needs", text + outside])
    else:
        lines.append(["times the text that CLM needs", "not measured: the text does not suffice"])
    return to_table(["quantity", "value (95 % interval)"], lines)


def _render_costs(costs: Mapping[str, Mapping[str, float]]) -> str:
    head = ["model", "seeds", "bits per byte of questions", "50-byte strings from the corpus"]
    return to_table(
        head,
        [
            [
                TITLES[role],
                f"{cost['seeds']:g}",
                f"{cost['elsewhere']:.4f}",
                f"{cost['copied']:.2%}",
            ]
            for role, cost in costs.items()
        ],
    )


def _write_share(found: Mapping[str, float]) -> str:
    return f"{found['value']:.1%} ({found['low']:.1%} to {found['high']:.1%})".replace("%", " %")


def draw_regimes(regimes: Mapping[str, Regime]) -> bytes:
    """Plot CLM's bits per byte against its text, with fusion and the ensembles, by regime."""
    shown = {name: regime for name, regime in regimes.items() if "gain" in regime}
    figure, rows = new_figure(2.9 * max(len(shown), 1), rows=max(len(shown), 1))
    for axes, (name, regime) in zip(rows, shown.items(), strict=False):
        multiples = {int(role[4:-1]): regime[role] for role in regime if role.startswith("clm ")}
        points = {1: regime["clm"]} | multiples
        axes.plot(list(points), list(points.values()), marker="s", linestyle="-", label="CLM")
        axes.plot(
            [1], [regime["fused"]], marker="*", markersize=13, linestyle="none", label="fused"
        )
        axes.axhline(regime["fused"], linestyle="--", linewidth=1, color=INK)
        for role, style in (("best_source", "-."), ("ensemble_filter", ":")):
            axes.axhline(regime[role], linestyle=style, linewidth=1, color=INK)
            axes.annotate(
                TITLES[role], (1, regime[role]), textcoords="offset points", xytext=(4, 3)
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(points), [f"{times}x" for times in points])
        axes.minorticks_off()
        axes.set_ylabel("bits per byte")
        axes.set_title(f"{name}: {SITUATIONS[name]}")
    if shown:
        rows[-1].set_xlabel("text that is trained on, as a multiple of the corpus")
        put_legend_outside(rows[-1], 2)
    return to_png(figure)
