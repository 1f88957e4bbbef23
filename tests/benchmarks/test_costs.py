"""What training on a corpus costs elsewhere is measured on text unlike it, and averaged by role."""

import json

import pytest

from benchmarks.fusion.costs import COPIED_BYTES, ELSEWHERE, read_elsewhere, share_copied
from benchmarks.fusion.regime_pages import render_page
from benchmarks.fusion.regime_plan import COSTLY, plan_costs, plan_regime
from benchmarks.fusion.regime_report import describe_costs
from benchmarks.fusion.units import Unit, do_unit, list_with_needs
from benchmarks.fusion.work import work


def test_strings_of_the_corpus_are_counted_as_copied():
    corpus = ["abcdefghij" * 10, "x" * 20]
    assert share_copied(["abcdefghij" * 6], corpus) == 1.0
    assert share_copied(["ABCDEFGHIJ" * 6, "x" * COPIED_BYTES], corpus) == 0.0
    half = "abcdefghij" * 5 + "-" * 49  # the first of 50 strings is in the corpus
    assert share_copied([half], corpus) == pytest.approx(1 / 50)
    assert share_copied(["short"], corpus) == 0.0


def test_questions_come_with_their_right_answers(shared_data):
    found = read_elsewhere(shared_data)
    assert len(found) > 100 * len(ELSEWHERE)
    item = json.loads((shared_data / f"eval/{ELSEWHERE[0]}.jsonl").read_text().splitlines()[0])
    assert found[0].text == f"{item['question']} {item['choices'][item['answer']]}"


def test_costs_are_measured_of_the_chosen_models(shared_data, tmp_path):
    plan = plan_regime("tiny", 2)
    chosen = {"target": "target", "clm": next(n for n in plan["clm"] if n != "no training")}
    units = plan_costs("tiny", 2, chosen)
    assert set(units) == {"target", "clm"} < set(COSTLY)
    for unit in list_with_needs(units.values()):
        do_unit(unit, tmp_path, shared_data, work)
    costs = describe_costs(list(units.values()), tmp_path)
    assert costs["target"]["elsewhere"] != costs["clm"]["elsewhere"] > 2
    assert 0 <= costs["clm"]["copied"] <= 1 == costs["clm"]["seeds"]
    regime = {"seeds": 1, "chosen": {}, "selection": {}, "costs": costs}
    assert f"| CLM | 1 | {costs['clm']['elsewhere']:.4f} |" in render_page({"tiny": regime})


def test_a_role_without_results_has_no_costs(tmp_path):
    assert describe_costs([Unit("costs", "x", {"role": "clm"})], tmp_path) == {}
