"""The report begins with what fusion gained over CLM here, or why it gained nothing."""

from dataclasses import replace

import pytest

from rayfuse.config.recipe import Recipe
from rayfuse.config.train import Ramp
from rayfuse.evaluate.scores import ALL, bits_per_byte
from rayfuse.report.gain import NO_REASON, find_reasons, state_gain
from rayfuse.report.gather import Findings, SourceSignal
from rayfuse.report.verdict import judge
from tests.report.test_verdict import BETTER, FEW, UNCLEAR, WORSE, with_outcomes


def change(recipe: Recipe, **train) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})


@pytest.fixture
def sound(recipe: Recipe) -> Recipe:
    """Make a recipe to which no reason applies."""
    return change(recipe, epochs=8, clm_weight=0.3)


def test_a_gain_is_stated_as_a_share_of_clm_with_its_interval(findings: Findings, sound: Recipe):
    clm = bits_per_byte(findings.evaluations["clm"].documents)[ALL]
    low, value, high = (f"{each / clm:.2%}".replace("%", "\u00a0%") for each in (0.03, 0.02, 0.01))
    assert state_gain(with_outcomes(findings, clm=BETTER), sound) == (
        f"Fusion helped: \u2212{value} bits per byte against CLM at the same learning rate "
        "(1e-05), after the same 8 epochs "
        f"(95\u00a0% interval \u2212{low} to \u2212{high})."
    )


def test_where_clm_is_worse_than_no_training_fused_is_compared_with_that_too(findings, sound):
    found = with_outcomes(findings, clm=BETTER, target=UNCLEAR)
    assert "untouched" not in str(state_gain(found, sound))
    swapped = findings.evaluations | {
        "clm": findings.evaluations["target"],
        "target": findings.evaluations["clm"],
    }
    target = bits_per_byte(swapped["target"].documents)[ALL]
    share = f"{0.01 / target:.2%}".replace("%", "\u00a0%")
    assert f"made the target worse; fused is \u2212{share} against the untouched target" in str(
        state_gain(replace(found, evaluations=swapped), sound)
    )


@pytest.mark.parametrize(
    ("outcome", "start"),
    [(WORSE, "Fusion did not help: +"), (UNCLEAR, "No clear gain from fusion: \u2212")],
)
def test_where_no_reason_is_known_none_is_named(findings, sound, outcome, start):
    sentence = state_gain(with_outcomes(findings, clm=outcome), sound)
    assert sentence is not None
    assert sentence.startswith(start)
    assert sentence.endswith(NO_REASON)


def test_reasons_are_named_only_where_fusion_did_not_help(findings: Findings, recipe: Recipe):
    assert "reasons" in str(state_gain(with_outcomes(findings, clm=WORSE), recipe))
    assert "reasons" not in str(state_gain(with_outcomes(findings, clm=BETTER), recipe))


def test_few_documents_and_runs_without_clm_make_no_claim(findings: Findings, recipe: Recipe):
    assert "unknown: 3 held-out documents" in str(
        state_gain(with_outcomes(findings, clm=FEW), recipe)
    )
    assert state_gain(with_outcomes(findings, big=BETTER), recipe) is None
    verdict = judge(with_outcomes(findings, big=BETTER), recipe)
    assert verdict.headline == "The fused model wins: it is better than source big."


def test_the_best_validation_is_named_where_it_chose_the_weights(findings, sound):
    chosen = replace(with_outcomes(findings, clm=BETTER), has_selection=True)
    assert "against CLM at the same learning rate (1e-05), each at its best validation" in str(
        state_gain(chosen, sound)
    )
    train = sound.train.model_copy(update={"baseline_learning_rate": 1e-6})
    own = sound.model_copy(update={"train": train})
    rates = "against CLM at learning rates of their own (CLM 1e-06, fused 1e-05), each at its best"
    assert rates in str(state_gain(chosen, own))


def weaken_sources(findings: Findings) -> Findings:
    kept = {name: each for name, each in findings.evaluations.items() if name != "big"}
    return replace(findings, evaluations=kept)


def with_signals(findings: Findings, signal: SourceSignal) -> Findings:
    return replace(findings, signals=dict.fromkeys(findings.signals, signal))


def shorten_training(findings: Findings) -> Findings:
    curve = findings.curves["fused"]
    curve = replace(curve, steps=curve.steps - len(curve.steps) + 50)
    return replace(findings, curves=findings.curves | {"fused": curve})


REASONS = {
    "no source knows this text better than CLM (coder": (weaken_sources, {}),
    "the text is read one time": (lambda findings: findings, {"epochs": 1}),
    "no source has a signal at more than 79% of positions": (
        lambda findings: with_signals(findings, SourceSignal(1000, 790, 0.05, None)),
        {},
    ),
    "20% of the sources' probability lies outside": (
        lambda findings: with_signals(findings, SourceSignal(1000, 900, 0.2, None)),
        {},
    ),
    "lambda is 0.7 on average": (
        lambda findings: findings,
        {"clm_weight": Ramp(start=0.5, end=0.9)},
    ),
    "training had 50 steps, fewer than 100": (shorten_training, {}),
}


@pytest.mark.parametrize("reason", REASONS)
def test_each_reason_is_named_where_it_applies_and_only_there(findings, sound, reason):
    make, train = REASONS[reason]
    found = [*find_reasons(make(findings), change(sound, **train))]
    assert len(found) == 1
    assert found[0].startswith(reason)
