"""The scores of merges: one half of the held-out documents chooses, the other half compares."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from rayfuse.config.base import UserError
from rayfuse.corpus.split import is_for_selection
from rayfuse.evaluate.bootstrap import Difference
from rayfuse.evaluate.scores import (
    ALL,
    Evaluation,
    bits_per_byte,
    compare_evaluations,
    keep_compared,
    parse_evaluation,
)
from rayfuse.merge.plan import MergePlan
from rayfuse.run.layout import find_own_folder
from rayfuse.storage.seal import seal

REFERENCES = ("target", "clm")
"""Models that no source has taught: they are compared with, and never chosen."""


@dataclass(frozen=True)
class Score:
    """Bits per byte of one model on both halves of the held-out documents."""

    selection: float
    """Of the documents that the choice is made by."""
    reported: float
    """Of the others."""
    difference: Difference | None
    """The chosen model minus this one, on the others; None for the chosen one."""


@dataclass(frozen=True)
class Comparison:
    """The models in the order of the table, and the one that is chosen."""

    chosen: str
    scores: Mapping[str, Score]


def read_scores(plan: MergePlan, names: list[str]) -> dict[str, Evaluation]:
    """Read the evaluations of models, on all held-out documents.

    Raises:
        ShardError: One is corrupt.
    """
    store, files = plan.layout.store, plan.layout.evaluation.scores
    return {
        name: parse_evaluation(store.read(files[name]), f"{store.root}/{files[name]}")
        for name in names
    }


def compare_models(evaluations: Mapping[str, Evaluation], *, samples: int, seed: int) -> Comparison:
    """Choose the model with the fewest bits per byte on one half, and compare it on the other.

    Args:
        evaluations: By name, on the same documents.
        samples: Resamples for the confidence intervals.
        seed: Their seed.

    Raises:
        UserError: There are no documents in one of the halves.
    """
    selection = {name: _keep_selection(found) for name, found in evaluations.items()}
    reported = {name: keep_compared(found) for name, found in evaluations.items()}
    for half, what in ((selection, "choose the merge by"), (reported, "compare the merges on")):
        if not all(found.documents for found in half.values()):
            raise UserError(
                f"there are no held-out documents to {what}; raise evaluate.held_out_share, or "
                "give more evaluate.documents"
            )
    bits = {name: bits_per_byte(found.documents)[ALL] for name, found in selection.items()}
    chosen = min((name for name in bits if name not in REFERENCES), key=lambda name: bits[name])
    scores = {
        name: Score(
            selection=bits[name],
            reported=bits_per_byte(found.documents)[ALL],
            difference=None
            if name == chosen
            else compare_evaluations(reported[chosen], found, samples=samples, seed=seed)[ALL],
        )
        for name, found in reported.items()
    }
    return Comparison(chosen, scores)


def _keep_selection(evaluation: Evaluation) -> Evaluation:
    kept = [score for score in evaluation.documents if is_for_selection(score.doc_id)]
    return replace(evaluation, documents=kept)


def describe_model_of(plan: MergePlan, name: str) -> str:
    """Describe a model of the plan, for the table."""
    pairs = {pair.run.name: f"fused with {pair.source} alone" for pair in plan.pairs}
    if name in pairs:
        return pairs[name]
    if name in plan.merges:
        return f"merged by {plan.merges[name]}"
    others = {"target": "untouched target", "clm": "same text, no fusion"}
    return others.get(name, "fused with all sources at once")


def to_values(plan: MergePlan, comparison: Comparison) -> dict[str, Any]:
    """Convert a comparison to plain JSON values; infinite bounds of intervals become null."""
    layout = plan.layout
    models: dict[str, Any] = {}
    for name, score in comparison.scores.items():
        folder = find_own_folder(name, layout)
        difference = score.difference
        models[name] = {
            "what": describe_model_of(plan, name),
            "folder": None if folder is None else f"{layout.store.root}/{folder}",
            "bits_per_byte": {"selection": score.selection, "reported": score.reported},
            "difference": None if difference is None else _dump_difference(difference),
        }
    return {
        "chosen": comparison.chosen,
        "folder": models[comparison.chosen]["folder"],
        "models": models,
        "merge": plan.recipe.merge.model_dump(mode="json"),
        "sources": [pair.source for pair in plan.pairs],
        "noise": [*plan.noise],
    }


def _dump_difference(difference: Difference) -> dict[str, Any]:
    values = asdict(difference) | {"outcome": difference.outcome}
    del values["higher_is_better"]
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def write_results(plan: MergePlan, values: dict[str, Any]) -> None:
    """Store the results, unless they are there already."""
    store, content = plan.layout.store, seal(json.loads(json.dumps(values)))
    folder, _, name = plan.results_file.rpartition("/")
    if name not in store.sizes(folder) or store.read(plan.results_file) != content:
        store.write(plan.results_file, content)


def print_table(plan: MergePlan, comparison: Comparison, console: Console) -> None:
    """Print the scores, and which model is chosen."""
    table = Table(title="bits per byte on held-out text (lower is better)")
    for head in ("model", "what it is", "selection half", "reported half", "chosen minus it"):
        table.add_column(head)
    for name, score in comparison.scores.items():
        table.add_row(
            name,
            describe_model_of(plan, name),
            f"{score.selection:.4f}",
            f"{score.reported:.4f}",
            "chosen" if score.difference is None else _show_difference(score.difference),
            style="bold" if name == comparison.chosen else "",
        )
    console.print(table)


def _show_difference(difference: Difference) -> str:
    if not math.isfinite(difference.low):
        return f"{difference.difference:+.4f} (too few documents for an interval)"
    bounds = f"{difference.low:+.4f} to {difference.high:+.4f}"
    return f"{difference.difference:+.4f} ({bounds}): {difference.outcome}"
