"""The verdict claims no more than the intervals allow."""

import math
from dataclasses import replace

import pytest

from rayfuse.config.recipe import Recipe
from rayfuse.evaluate.bootstrap import Difference
from rayfuse.report.gather import Findings
from rayfuse.report.verdict import NO_BASELINE, format_signed, join_names, judge, note_tasks
from rayfuse.run.layout import Merge
from tests.report.conftest import HOSTILE

BETTER = Difference(-0.02, -0.03, -0.01, 50)
WORSE = Difference(0.02, 0.01, 0.03, 50)
UNCLEAR = Difference(-0.01, -0.02, 0.01, 50)
FEW = Difference(-0.01, -math.inf, math.inf, 3)


def with_outcomes(findings: Findings, **outcomes: Difference) -> Findings:
    return replace(findings, differences={name: {"all": d} for name, d in outcomes.items()})


def test_a_run_better_than_every_other_has_won(findings: Findings, recipe: Recipe):
    verdict = judge(with_outcomes(findings, big=BETTER, target=BETTER, clm=BETTER), recipe)
    assert verdict.outcome == "won"
    assert verdict.sentences[0] == (
        "The fused model wins: it is better than CLM, the untouched target and source big."
    )


def test_one_model_that_is_better_is_a_run_that_did_not_win(findings: Findings, recipe: Recipe):
    verdict = judge(with_outcomes(findings, big=WORSE, coder=UNCLEAR, clm=BETTER), recipe)
    assert verdict.outcome == "lost"
    assert verdict.sentences[0] == (
        "The fused model did not win: it is worse than source big and there is no clear "
        "difference from source coder. It is better than CLM."
    )


def test_an_interval_that_includes_zero_is_no_clear_difference(findings: Findings, recipe: Recipe):
    verdict = judge(with_outcomes(findings, clm=UNCLEAR, big=BETTER), recipe)
    assert verdict.outcome == "unclear"
    assert verdict.sentences[0].startswith("The fused model did not clearly win: there is no clear")
    assert "no clear difference, the interval includes zero." in verdict.sentences[1]
    assert (
        "\u22120.0100 (95 % interval \u22120.0200 to +0.0100, 50 documents)"
        in (verdict.sentences[1])
    )


def test_a_loss_against_the_baseline_is_stated(findings: Findings, recipe: Recipe):
    verdict = judge(with_outcomes(findings, clm=WORSE), recipe)
    assert verdict.sentences[0] == "The fused model did not win: it is worse than CLM."
    assert "worse, fusion does not help here" in verdict.sentences[1]


def test_too_few_documents_make_no_claim_and_no_interval(findings: Findings, recipe: Recipe):
    verdict = judge(with_outcomes(findings, clm=FEW), recipe)
    assert verdict.outcome == "unclear"
    assert "3 held-out documents are too few for an interval" in verdict.sentences[1]
    assert "inf" not in " ".join(verdict.sentences)


def test_a_run_without_baseline_makes_no_claim_about_fusion(findings: Findings, recipe: Recipe):
    assert NO_BASELINE in judge(with_outcomes(findings, big=BETTER), recipe).sentences
    assert NO_BASELINE not in judge(with_outcomes(findings, clm=BETTER), recipe).sentences


def test_the_ensemble_and_the_merge_are_named_in_words(findings: Findings, recipe: Recipe):
    verdict = judge(with_outcomes(findings, ensemble=WORSE, merged=UNCLEAR, clm=BETTER), recipe)
    assert verdict.sentences[0] == (
        "The fused model did not win: it is worse than the ensemble of the sources and there is "
        "no clear difference from the merged weights. It is better than CLM."
    )


def test_only_a_loss_against_clm_says_that_fusion_does_not_help(findings, recipe):
    verdict = judge(with_outcomes(findings, ensemble=WORSE, clm=BETTER), recipe)
    assert verdict.headline.startswith("Fusion helped")
    assert (verdict.outcome, verdict.against_clm) == ("lost", "better")
    assert not any("not help" in sentence for sentence in verdict.sentences)
    assert judge(with_outcomes(findings, big=BETTER), recipe).against_clm is None


def test_excluded_sources_of_a_merge_are_named_with_the_reason(findings: Findings, recipe: Recipe):
    assert (
        "No source's weights can be averaged with the target's (big: its model_type is 'mpt', not "
        "'llama')."
    ) in judge(findings, recipe).sentences
    merged = replace(findings.merge, folder="evaluate/m", sources=("coder",))
    sentences = judge(replace(findings, merge=merged), recipe).sentences
    assert any(
        sentence.startswith("Excluded from the merged weights: big:") for sentence in sentences
    )
    silent = judge(replace(findings, merge=Merge()), recipe).sentences
    assert not any("averaged" in sentence or "merged" in sentence for sentence in silent[-2:])


def test_at_tasks_better_goes_by_each_metric(findings: Findings, recipe: Recipe):
    sentences = note_tasks(findings.task_differences)
    assert sentences[0] == f"Tasks, against CLM: better at choose; worse at {HOSTILE}."
    assert sentences[2] == "Tasks, against the ensemble of the sources: better at choose."
    assert all(sentence in judge(findings, recipe).sentences for sentence in sentences)


def test_domains_are_compared_with_the_baseline(findings: Findings, recipe: Recipe):
    groups = {"all": BETTER, "code": WORSE, "": BETTER, "wiki": UNCLEAR}
    verdict = judge(replace(findings, differences={"clm": groups}), recipe)
    assert verdict.sentences[2] == (
        "By domain, against CLM: better on (no domain); worse on code; no clear difference on wiki."
    )


@pytest.mark.parametrize(
    ("names", "joined"), [([], ""), (["a"], "a"), (["a", "b"], "a and b"), ([*"abc"], "a, b and c")]
)
def test_names_are_joined_as_in_prose(names: list[str], joined: str):
    assert join_names(names) == joined


def test_a_signed_number_always_has_a_sign():
    assert (format_signed(0.1234), format_signed(-0.5)) == ("+0.1234", "\u22120.5000")
