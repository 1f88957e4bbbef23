"""Task scores of two models and the confidence interval of their difference."""

import math
from dataclasses import replace

import numpy as np
import pytest

from rayfuse.evaluate.task_scores import (
    SubtaskScore,
    TaskScore,
    compare_tasks,
    parse_task_score,
    read_samples,
)


def score(name: str, *values: list[float], higher_is_better: bool = True) -> TaskScore:
    """Return a score at a group with one task for each list of values."""
    subtasks = tuple(
        SubtaskScore(
            f"t{i}",
            "acc",
            higher_is_better,
            float(np.mean(own)),
            tuple(f"q{j}" for j in range(len(own))),
            tuple(own),
            (1.0,) * len(own),
        )
        for i, own in enumerate(values)
    )
    return TaskScore(name, "group", subtasks, 1.0)


def draws(chance: float, number: int, seed: int) -> list[float]:
    return np.random.default_rng(seed).binomial(1, chance, number).astype(float).tolist()


def test_a_score_survives_a_round_trip_through_its_file():
    own = score("fused", [1.0, 0.0], [1.0])
    assert parse_task_score(own.to_json()) == own


def test_a_group_is_the_mean_of_its_tasks_whatever_their_size():
    own = score("fused", [1.0, 0.0], [1.0] * 50)
    assert own.value == pytest.approx(0.75)
    found = compare_tasks(own, score("clm", [0.0, 0.0], [0.0] * 50), samples=100, seed=0)
    assert found.difference == pytest.approx(0.75)


def test_the_interval_of_an_accuracy_has_the_width_of_its_binomial():
    ours, theirs = draws(0.7, 2000, 1), draws(0.4, 2000, 2)
    found = compare_tasks(score("fused", ours), score("clm", theirs), samples=2000, seed=0)
    expected = 2 * 1.96 * math.sqrt((0.7 * 0.3 + 0.4 * 0.6) / 2000)
    assert found.high - found.low == pytest.approx(expected, rel=0.1)
    assert found.low < np.mean(ours) - np.mean(theirs) < found.high
    assert found.outcome == "better"


def test_the_direction_of_the_metric_decides_which_model_is_better():
    low, high = [0.1, 0.2] * 20, [0.3, 0.5] * 20
    for higher_is_better, outcome in ((True, "worse"), (False, "better")):
        a, b = (
            score(name, own, higher_is_better=higher_is_better)
            for name, own in (("fused", low), ("clm", high))
        )
        assert compare_tasks(a, b, samples=100, seed=0).outcome == outcome


def test_equal_answers_are_unclear():
    own = score("fused", draws(0.5, 100, 3))
    found = compare_tasks(own, replace(own, name="clm"), samples=100, seed=0)
    assert (found.difference, found.low, found.high, found.outcome) == (0.0, 0.0, 0.0, "unclear")


def test_models_that_answered_different_questions_are_not_compared():
    a, b = score("fused", [1.0, 0.0]), score("clm", [1.0])
    with pytest.raises(ValueError, match="fused and clm answered different questions of t0"):
        compare_tasks(a, b, samples=10, seed=0)


def test_a_metric_without_questions_of_its_own_has_no_interval():
    results = {"acc,none": 0.5, "acc_stderr,none": 0.1, "f1,none": 0.4, "alias": "t"}
    samples = [
        {"filter": "none", "doc_hash": str(i), "acc": float(i % 2), "f1": (0, 1)} for i in range(8)
    ]
    f1, acc = read_samples("t", samples, results, {"f1": True, "acc": True})
    assert (f1.metric, f1.values, f1.value) == ("f1", (), 0.4)
    assert (acc.metric, acc.values[:2], acc.value) == ("acc", (0.0, 1.0), 0.5)
    ours, theirs = (TaskScore(name, "t", (f1, acc), 1.0) for name in ("fused", "clm"))
    assert compare_tasks(ours, theirs, samples=10, seed=0).outcome == "unclear"


def test_a_metric_that_is_not_the_mean_of_its_questions_has_no_interval():
    samples = [{"filter": "none", "doc_hash": str(i), "odd": float(i)} for i in range(8)]
    (odd,) = read_samples("t", samples, {"odd,none": 99.0}, {"odd": True})
    assert (odd.value, odd.values) == (99.0, ())
