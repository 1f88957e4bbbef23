"""One half of the held-out documents chooses, the other half compares."""

from dataclasses import replace

import numpy as np
import pytest

from rayfuse.config.base import UserError
from rayfuse.corpus.split import is_for_selection
from rayfuse.evaluate.scores import (
    ALL,
    DocumentScore,
    Evaluation,
    compare_evaluations,
    keep_compared,
)
from rayfuse.merge.results import compare_models

NAMES = [f"d{number}" for number in range(60)]


def make(name: str, selection: float, reported: float) -> Evaluation:
    """Make an evaluation with a NLL per byte on each half, and noise by document."""
    random = np.random.default_rng(sum(map(ord, name)))
    documents = [
        DocumentScore(
            doc_id, "", 100, 100 * (selection if is_for_selection(doc_id) else reported) + noise
        )
        for doc_id, noise in zip(NAMES, random.normal(0, 0.5, len(NAMES)), strict=True)
    ]
    return Evaluation(name, "merged", name, documents, 1.0)


def test_the_choice_is_made_by_one_half_and_compared_on_the_other():
    found = {
        "target": make("target", 0.1, 0.1),  # never chosen
        "clm": make("clm", 0.2, 1.5),  # nor is this one
        "fused": make("fused", 1.2, 0.7),  # the best on the half that reports
        "merged-ties": make("merged-ties", 0.9, 1.0),
        "merged-sce": make("merged-sce", 1.0, 0.9),
    }
    comparison = compare_models(found, samples=500, seed=0)
    assert comparison.chosen == "merged-ties"
    assert comparison.scores["merged-ties"].difference is None
    for name, evaluation in found.items():
        score = comparison.scores[name]
        for bits, is_selection in ((score.selection, True), (score.reported, False)):
            kept = [d for d in evaluation.documents if is_for_selection(d.doc_id) == is_selection]
            nats, num_bytes = sum(d.nats for d in kept), sum(d.num_bytes for d in kept)
            assert bits == pytest.approx(nats / np.log(2) / num_bytes)
        if name != "merged-ties":
            pair = (keep_compared(found["merged-ties"]), keep_compared(evaluation))
            expected = compare_evaluations(*pair, samples=500, seed=0)[ALL]
            assert score.difference == expected
    outcomes = {name: score.difference for name, score in comparison.scores.items()}
    assert [outcomes[name].outcome for name in ("clm", "fused")] == ["better", "worse"]


@pytest.mark.parametrize("is_selection", [True, False])
def test_a_half_without_documents_is_refused(is_selection: bool):
    found = make("merged-sce", 1.0, 1.0)
    kept = [d for d in found.documents if is_for_selection(d.doc_id) != is_selection]
    what = "choose the merge by" if is_selection else "compare the merges on"
    with pytest.raises(UserError, match=f"no held-out documents to {what}; raise evaluate.held"):
        compare_models({"merged-sce": replace(found, documents=kept)}, samples=10, seed=0)
