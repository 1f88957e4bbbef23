"""The report is written completely, and is current until a result changes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rayfuse.config.recipe import Recipe
from rayfuse.evaluate.scores import parse_evaluation
from rayfuse.report.stage import identify_inputs, is_report_current, write_report
from rayfuse.run.layout import EvaluationFiles, Layout


def test_a_report_is_current_once_written_and_until_a_result_changes(
    layout: Layout, recipe: Recipe
):
    assert not is_report_current(layout)
    place = write_report(recipe, layout)
    assert is_report_current(layout)
    assert place == f"{layout.store.root}/report/index.html"
    assert Path(place).read_text().startswith("<!doctype html>")
    changed = layout.evaluation.scores | {"clm": "evaluate/clm-1.json"}
    assert not is_report_current(replace(layout, evaluation=EvaluationFiles(scores=changed)))
    layout.store.remove("report/index.html")
    assert not is_report_current(layout)


def test_every_part_of_the_report_is_written(layout: Layout, recipe: Recipe):
    write_report(recipe, layout)
    assert set(layout.store.sizes("report")) == {
        "alignment.png",
        "bits_per_byte.png",
        "differences.png",
        "findings.json",
        "index.html",
        "source_selection.png",
        "table.md",
        "training_curves.png",
    }
    assert "README.md" in layout.store.sizes("train/fused-0/model")


def test_the_findings_are_json_that_any_reader_takes(layout: Layout, recipe: Recipe):
    write_report(recipe, layout)
    found = json.loads(layout.store.read("report/findings.json"))
    assert found["input"] == identify_inputs(layout)
    assert found["verdict"]["outcome"] == "lost"
    assert found["source_selection"]["counts"]["wiki"] == {"big": 1, "coder": 0}
    assert found["training"]["fused"]["steps"] == 3
    assert found["training"]["clm"]["last_fusion_loss"] is None
    assert found["fused_minus"]["clm"]["all"]["outcome"] == "better"


def test_a_report_of_what_is_not_evaluated_is_refused(layout: Layout, recipe: Recipe):
    layout.store.remove(layout.evaluation.scores["fused"])
    with pytest.raises(ValueError, match="model fused is not evaluated"):
        write_report(recipe, layout)
    assert not is_report_current(layout)


def test_a_report_is_its_recipes_own(layout: Layout, recipe: Recipe):
    write_report(recipe, layout)
    other = replace(layout, recipe={"seed": 1})
    assert not is_report_current(other)
    layout.store.write("report/index.html", b"the page of another recipe")
    assert not is_report_current(layout)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}"])
def test_a_corrupt_record_of_a_report_counts_as_none(content, layout: Layout, recipe: Recipe):
    layout.store.write("report/findings.json", content)
    assert not is_report_current(layout)
    write_report(recipe, layout)
    assert is_report_current(layout)


def test_a_report_of_changed_scores_is_not_current(layout: Layout, recipe: Recipe):
    write_report(recipe, layout)
    file = layout.evaluation.scores["fused"]
    score = parse_evaluation(layout.store.read(file))
    layout.store.write(file, replace(score, seconds=score.seconds + 1).to_json())
    assert not is_report_current(layout)
