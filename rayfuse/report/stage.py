"""The report stage: results in the store -> page, plots, tables and model card in the store."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from rayfuse.config.recipe import Recipe
from rayfuse.evaluate.bootstrap import Difference
from rayfuse.evaluate.scores import bits_per_byte
from rayfuse.report.gather import Curve, Findings, gather_findings
from rayfuse.report.licences import read_licences
from rayfuse.report.model_card import build_model_card
from rayfuse.report.page import build_page
from rayfuse.report.spans import share_waited, sum_busy
from rayfuse.report.tables import render_tables
from rayfuse.report.verdict import Verdict, judge
from rayfuse.run.fingerprint import fingerprint_of
from rayfuse.run.layout import Layout
from rayfuse.storage.files import find_corrupt, has_all_files, hash_bytes, read_record, write_record
from rayfuse.storage.seal import ShardError

PAGE_FILE = "report/index.html"
FINDINGS_FILE = "report/findings.json"


def write_report(recipe: Recipe, layout: Layout) -> str:
    """Write the report and the fused model's card, and return the address of the page.

    `findings.json` is written last: it commits the report.

    Raises:
        UserError: A model is not evaluated.
        UserError: Models are evaluated on different documents.
        ShardError: A shard is missing or corrupt, or holds other rows than the corpus.
    """
    # matplotlib takes a second to import, and `rayfuse status` imports this module.
    from rayfuse.report.plots import draw_plots

    findings = gather_findings(recipe, layout)
    verdict = judge(findings, recipe)
    plots = draw_plots(findings)
    run = next(run for run in layout.runs if run.name == "fused")
    texts = {
        PAGE_FILE: build_page(findings, verdict, recipe, plots),
        "report/table.md": render_tables(findings),
        f"{run.folder}/model/README.md": build_model_card(
            findings, verdict, recipe, read_licences(recipe, is_online=False)
        ),
    }
    files = {f"report/{name}.png": png for name, png in plots.items()}
    files |= {name: text.encode() for name, text in texts.items()}
    layout.store.remove(FINDINGS_FILE)  # of another report, which these files replace
    for name, content in files.items():
        layout.store.write(name, content)
    values = describe_findings(findings, verdict, identify_inputs(layout))
    json.dumps(values, allow_nan=False)  # NaN is no JSON
    hashes = {name.removeprefix("report/"): hash_bytes(files[name]) for name in files}
    card = hashes.pop(f"{run.folder}/model/README.md")
    write_record(layout.store, FINDINGS_FILE, values | {"model_card": card}, hashes)
    return f"{layout.store.root}/{PAGE_FILE}"


def identify_inputs(layout: Layout) -> str:
    """Hash all that a report is made from: the recipe, and the bytes of every result."""
    results = {file: layout.store.hash_file(file) for file in layout.evaluation.list_files()}
    failed = {"failed": dict(layout.failed)} if layout.failed else {}
    return fingerprint_of(
        layout=layout.input_fingerprint(), results=results, recipe=layout.recipe, **failed
    )


def find_corrupt_report(layout: Layout) -> Iterator[tuple[str, str]]:
    """Yield the corrupt files of a report, each with the reason.

    The model card lies beside the model. If it is not the one that was written, the report's record
    is named: without it the report is written again, and the card with it.
    """
    corrupt = list(find_corrupt(layout.store, FINDINGS_FILE))
    yield from corrupt
    if corrupt:
        return
    record = read_record(layout.store, FINDINGS_FILE)
    run = next((run for run in layout.runs if run.name == "fused"), None)
    if record is None or run is None:
        return
    card = f"{run.folder}/model/README.md"
    try:
        is_intact = layout.store.hash_file(card) == record["model_card"]["sha256"]
    except FileNotFoundError:
        is_intact = False
    try:
        is_current = record["input"] == identify_inputs(layout)
    except FileNotFoundError:  # a result is missing: the report will be written again
        is_current = False
    if is_current and not is_intact:
        yield FINDINGS_FILE, f"the model card {card} is not the one that was written with it"


def is_report_current(layout: Layout) -> bool:
    """Check whether the report is complete and made from this recipe and its current results.

    A corrupt record counts as none: the report is written again.
    """
    try:
        record = read_record(layout.store, FINDINGS_FILE)
        if record is None or record["input"] != identify_inputs(layout):
            return False
    except (FileNotFoundError, ShardError):
        return False
    return has_all_files(layout.store, FINDINGS_FILE, record)


def describe_findings(
    findings: Findings, verdict: Verdict, input_fingerprint: str
) -> dict[str, Any]:
    """Convert the report's numbers to JSON values.

    Args:
        findings: The results.
        verdict: The claims that they support.
        input_fingerprint: Hash of everything that the report is made from.
    """
    return {
        "input": input_fingerprint,
        "verdict": asdict(verdict),
        "bits_per_byte": {
            name: bits_per_byte(model.documents) for name, model in findings.evaluations.items()
        },
        "fused_minus": {
            name: {group: _dump_difference(value) for group, value in groups.items()}
            for name, groups in findings.differences.items()
        },
        "tasks": {
            task: {name: score.value for name, score in scores.items()}
            for task, scores in findings.task_scores.items()
        },
        "fused_minus_at_tasks": {
            task: {name: _dump_difference(value) for name, value in others.items()}
            for task, others in findings.task_differences.items()
        },
        "merged_weights": asdict(findings.merge),
        "overlap": asdict(findings.overlap),
        "task_overlap_fault": findings.task_overlap_fault,
        "task_overlap": {task: asdict(found) for task, found in findings.task_overlap.items()},
        "training": {name: _dump_curve(curve) for name, curve in findings.curves.items()},
        "source_selection": asdict(findings.selection),
        "signals": {
            name: asdict(signal) | {"share": signal.share}
            for name, signal in findings.signals.items()
        },
        "capture": {
            name: {
                "workers": len({span.worker for span in shards}),
                "tokens": sum(span.tokens for span in shards),
                "busy_seconds": sum_busy(shards),
                "share_waited": share_waited(shards),
            }
            for name, shards in findings.spans.items()
        },
        "stages": [asdict(count) for count in findings.counts],
        "evaluation_seconds": {name: model.seconds for name, model in findings.evaluations.items()},
    }


def _dump_difference(difference: Difference) -> dict[str, Any]:
    """Convert a difference to JSON values; infinite bounds of its interval become null."""
    bounds = {"low": difference.low, "high": difference.high}
    finite = {name: value if math.isfinite(value) else None for name, value in bounds.items()}
    return asdict(difference) | finite | {"outcome": difference.outcome}


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
