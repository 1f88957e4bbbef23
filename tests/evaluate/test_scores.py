"""Bits per byte of models, and the confidence intervals of their differences."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest

from rayfuse.config.models import RESERVED_NAMES
from rayfuse.evaluate.bootstrap import Difference
from rayfuse.evaluate.scores import (
    MAX_DOMAINS,
    OTHER,
    OWN_ROLES,
    DocumentScore,
    Evaluation,
    bits_per_byte,
    compare_evaluations,
    count_bytes,
    find_role,
    parse_evaluation,
)

LN2 = math.log(2)


def evaluate(nats: list[float], *, name: str = "fused", domains: str = "aabb") -> Evaluation:
    documents = [
        DocumentScore(f"d{i}", domains[i % len(domains)], 100 + i, value)
        for i, value in enumerate(nats)
    ]
    return Evaluation(name, find_role(name), "folder", documents, 1.5)


def random_nats(number: int, seed: int) -> list[float]:
    return np.random.default_rng(seed).uniform(100.0, 200.0, number).tolist()


def test_bits_per_byte_weighs_documents_by_their_bytes():
    scores = [
        DocumentScore("a", "wiki", 10, 20 * LN2),
        DocumentScore("b", "code", 30, 30 * LN2),
        DocumentScore("c", "code", 10, 20 * LN2),
    ]
    assert bits_per_byte(scores) == pytest.approx({"all": 70 / 50, "code": 50 / 40, "wiki": 2.0})
    assert count_bytes(scores) == {"all": 50, "code": 40, "wiki": 10}


def test_a_domain_named_all_does_not_hide_the_total():
    scores = [DocumentScore("a", "all", 10, 10 * LN2), DocumentScore("b", "wiki", 10, 30 * LN2)]
    assert bits_per_byte(scores)["all"] == pytest.approx(2.0)


def test_scores_of_no_documents_are_refused():
    with pytest.raises(ValueError, match="no held-out documents"):
        bits_per_byte([])


def test_all_but_the_largest_domains_are_one_group():
    scores = [DocumentScore(f"d{i}", f"{i:04d}", 1 + i, (1 + i) * LN2) for i in range(1000)]
    sizes = count_bytes(scores)
    largest = [f"{i:04d}" for i in range(1000 - MAX_DOMAINS, 1000)]
    assert list(sizes) == ["all", *largest, OTHER]
    assert sum(sizes[group] for group in [*largest, OTHER]) == sizes["all"]
    assert bits_per_byte(scores) == pytest.approx(dict.fromkeys(sizes, 1.0))


def test_a_domain_for_each_document_is_grouped_in_linear_time():
    def measure(num_documents: int) -> float:
        scores = [DocumentScore("d", f"host-{i}", 10, 10 * LN2) for i in range(num_documents)]
        began = time.process_time()
        bits_per_byte(scores)
        return time.process_time() - began

    measure(100)
    assert measure(100_000) < 60 * max(measure(10_000), 0.01)


def test_an_evaluation_survives_a_round_trip_through_its_file():
    evaluation = evaluate(random_nats(5, seed=0))
    assert parse_evaluation(evaluation.to_json()) == evaluation


def test_every_name_that_is_not_reserved_is_a_source():
    own = ["target", "clm", "fused", "ensemble", "merged"]
    assert [find_role(name) for name in ["mpt", *own]] == ["source", *own]
    assert set(OWN_ROLES) < set(RESERVED_NAMES)


def test_a_model_does_not_differ_from_itself():
    model = evaluate(random_nats(40, seed=1))
    found = compare_evaluations(model, replace(model, name="clm"), samples=200, seed=0)
    assert set(found) == {"all", "a", "b"}
    for gap in found.values():
        assert (gap.difference, gap.low, gap.high) == (0.0, 0.0, 0.0)
        assert gap.outcome == "unclear"


def test_swapping_two_models_mirrors_the_difference():
    a, b = evaluate(random_nats(40, seed=1)), evaluate(random_nats(40, seed=2), name="clm")
    there = compare_evaluations(a, b, samples=500, seed=3)["all"]
    back = compare_evaluations(b, a, samples=500, seed=3)["all"]
    assert there.difference == pytest.approx(-back.difference)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


def test_a_gain_on_every_document_is_better_and_a_loss_worse():
    nats = random_nats(40, seed=1)
    a, b = evaluate([value - 5.0 for value in nats]), evaluate(nats, name="clm")
    gain = compare_evaluations(a, b, samples=500, seed=0)["all"]
    assert gain.outcome == "better"
    assert gain.low <= gain.difference <= gain.high < 0
    assert gain.difference == pytest.approx(-5 * 40 / LN2 / sum(range(100, 140)))
    assert compare_evaluations(b, a, samples=500, seed=0)["all"].outcome == "worse"


def test_pairing_finds_a_gain_far_smaller_than_the_spread_of_documents():
    nats = random_nats(40, seed=1)
    a, b = evaluate([value * 0.999 for value in nats]), evaluate(nats, name="clm")
    assert compare_evaluations(a, b, samples=500, seed=0)["all"].outcome == "better"


def test_the_interval_has_the_width_that_theory_gives_it():
    draw = np.random.default_rng(5)
    base = draw.uniform(100.0, 200.0, 2000)
    noise = draw.normal(0.0, 10.0, 2000)
    documents = [DocumentScore(f"d{i}", "", 100, float(nats)) for i, nats in enumerate(base)]
    b = Evaluation("clm", "clm", "folder", documents, 0.0)
    noisy = [replace(d, nats=d.nats + float(n)) for d, n in zip(documents, noise, strict=True)]
    a = replace(b, documents=noisy)
    found = compare_evaluations(a, b, samples=2000, seed=0)["all"]
    expected = 2 * 1.96 * 10.0 / LN2 / 100 / math.sqrt(2000)
    assert found.high - found.low == pytest.approx(expected, rel=0.1)


def test_the_same_seed_gives_the_same_interval():
    a, b = evaluate(random_nats(40, seed=1)), evaluate(random_nats(40, seed=2), name="clm")
    first, same, other = (compare_evaluations(a, b, samples=300, seed=seed) for seed in (7, 7, 8))
    assert first == same
    assert first != other


def test_too_few_documents_give_no_interval():
    a, b = evaluate([1.0] * 5), evaluate([90.0] * 5, name="clm")
    found = compare_evaluations(a, b, samples=100, seed=0)["all"]
    assert found.difference < 0
    assert (found.low, found.high, found.outcome) == (-math.inf, math.inf, "unclear")


def test_models_scored_on_different_documents_are_not_compared():
    a = evaluate(random_nats(8, seed=1))
    b = replace(a, name="clm", documents=a.documents[:-1])
    with pytest.raises(ValueError, match=r"fused and clm were scored on different documents"):
        compare_evaluations(a, b, samples=10, seed=0)


def test_an_interval_that_touches_zero_is_unclear():
    assert Difference(-0.1, -0.2, 0.0, 9).outcome == "unclear"
    assert Difference(0.1, 0.0, 0.2, 9).outcome == "unclear"
