"""The report stage: results in the store -> page, pictures, tables and model card in the store."""

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np

from rayfuse.config.recipe import Recipe
from rayfuse.evaluate.bootstrap import Difference
from rayfuse.evaluate.scores import bits_per_byte
from rayfuse.report.gather import Curve, Findings, gather_findings
from rayfuse.report.model_card import build_model_card
from rayfuse.report.page import build_page
from rayfuse.report.tables import render_tables
from rayfuse.report.timeline import share_waited, sum_busy
from rayfuse.report.verdict import Verdict, judge
from rayfuse.run.layout import Layout

PAGE_FILE = "report/index.html"
FINDINGS_FILE = "report/findings.json"


def write_report(recipe: Recipe, layout: Layout) -> str:
    """Write the report and the fused model's card, and return where the page is.

    `findings.json` is written last: the report is there once it is.

    Raises:
        ValueError: A model is not evaluated, or not on the same documents as another.
        ShardError: A shard is missing or corrupt.
    """
    from rayfuse.report.plots import draw_plots  # a second of imports that `status` can do without

    findings = gather_findings(recipe, layout)
    verdict = judge(findings)
    plots = draw_plots(findings)
    run = next(run for run in layout.runs if run.name == "fused")
    texts = {
        PAGE_FILE: build_page(findings, verdict, recipe, plots),
        "report/table.md": render_tables(findings),
        f"{run.folder}/model/README.md": build_model_card(findings, verdict, recipe),
        FINDINGS_FILE: dump_findings(findings, verdict, layout.input_fingerprint()),
    }
    for name, png in plots.items():
        layout.store.write(f"report/{name}.png", png)
    for name, text in texts.items():
        layout.store.write(name, text.encode())
    return f"{layout.store.root}/{PAGE_FILE}"


def is_report_current(layout: Layout) -> bool:
    """Return whether the report is there and tells of what the run holds now."""
    try:
        findings = json.loads(layout.store.read(FINDINGS_FILE))
    except FileNotFoundError:
        return False
    is_there = PAGE_FILE.removeprefix("report/") in layout.store.sizes("report")
    return is_there and findings.get("input") == layout.input_fingerprint()


def dump_findings(findings: Findings, verdict: Verdict, input_fingerprint: str) -> str:
    """Return the numbers of the report as JSON.

    Args:
        findings: All numbers.
        verdict: What may be claimed of them.
        input_fingerprint: Hash of everything that is reported on.
    """
    record = {
        "input": input_fingerprint,
        "verdict": asdict(verdict),
        "bits_per_byte": {
            name: bits_per_byte(each.documents) for name, each in findings.evaluations.items()
        },
        "fused_minus": {
            name: {group: _dump_difference(each) for group, each in groups.items()}
            for name, groups in findings.differences.items()
        },
        "tasks": {
            task: {name: each.value for name, each in scores.items()}
            for task, scores in findings.task_scores.items()
        },
        "fused_minus_at_tasks": {
            task: {name: _dump_difference(each) for name, each in others.items()}
            for task, others in findings.task_differences.items()
        },
        "merged_weights": asdict(findings.merge),
        "training": {name: _dump_curve(curve) for name, curve in findings.curves.items()},
        "source_wins": asdict(findings.wins),
        "signals": {
            name: asdict(each) | {"share": each.share} for name, each in findings.signals.items()
        },
        "capture": {
            name: {
                "workers": len({spell.worker for spell in each}),
                "tokens": sum(spell.tokens for spell in each),
                "busy_seconds": sum_busy(each),
                "share_waited": share_waited(each),
            }
            for name, each in findings.spells.items()
        },
        "stages": [asdict(count) for count in findings.counts],
        "evaluation_seconds": {n: each.seconds for n, each in findings.evaluations.items()},
    }
    return json.dumps(record, indent=1, allow_nan=False)


def _dump_difference(each: Difference) -> dict[str, Any]:
    """Return a difference as JSON values; an interval without bounds has none."""
    bounds = {"low": each.low, "high": each.high}
    finite = {name: value if math.isfinite(value) else None for name, value in bounds.items()}
    return asdict(each) | finite | {"outcome": each.outcome}


def _dump_curve(curve: Curve) -> dict[str, Any]:
    clm = curve.clm_loss[np.isfinite(curve.clm_loss)]
    fusion = curve.fusion_loss[np.isfinite(curve.fusion_loss)]
    return {
        "steps": int(curve.steps[-1]),
        "tokens": int(curve.tokens[-1]),
        "seconds": float(curve.seconds.sum()),
        "last_clm_loss": float(clm[-1]) if len(clm) else None,
        "last_fusion_loss": float(fusion[-1]) if len(fusion) else None,
    }
