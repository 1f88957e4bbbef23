"""A run's scores at tasks are files named by all that decides them, and are checked for at once."""

from pathlib import Path
from typing import Any

import pytest

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.config.load import parse_recipe
from rayfuse.config.recipe import Recipe
from rayfuse.pipeline import is_stage_done, prepare_run
from rayfuse.run.layout import Layout, plan_layout
from rayfuse.storage.seal import seal
from tests.evaluate.test_merge_weights import make_model
from tests.evaluate.test_tasks import make_tasks


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "text.jsonl").write_text('{"text": "The cat sat."}\n')
    models = {name: str(make_model(tmp_path / name, seed)) for seed, name in enumerate("abt")}
    folder = str(make_tasks(tmp_path / "tasks"))
    return {
        "storage": str(tmp_path / "store"),
        "corpus": {"documents": str(tmp_path / "text.jsonl"), "max_tokens": 32},
        "target": {"model": models["t"]},
        "sources": [{"name": name, "model": models[name]} for name in "ab"],
        "evaluate": {"tasks": {"names": ["choose"], "folder": folder, "data": folder}},
    }


def change(values: dict[str, Any], **tasks: Any) -> Recipe:
    merged = values["evaluate"]["tasks"] | tasks
    return parse_recipe(values | {"evaluate": {"tasks": merged}})


def files_of(layout: Layout) -> set[str]:
    return {file for files in layout.evaluation.task_scores.values() for file in files.values()}


def test_every_model_has_a_file_for_every_task(values: dict[str, Any]):
    layout = plan_layout(parse_recipe(values), ALIGN_FACTS)
    assert set(layout.evaluation.task_scores) == set(layout.evaluation.scores)
    assert set(layout.evaluation.task_nll) == {"a", "b"}
    assert len(files_of(layout)) == len(layout.evaluation.scores)
    for file in layout.evaluation.scores.values():
        layout.store.write(file, seal({}))
    assert not is_stage_done("evaluate", layout)  # the tasks are still to be asked
    for file in files_of(layout):
        layout.store.write(file, seal({}))
    assert is_stage_done("evaluate", layout)
    silent = plan_layout(parse_recipe(values | {"evaluate": {}}), ALIGN_FACTS)
    assert silent.evaluation.scores == layout.evaluation.scores
    assert silent.input_fingerprint() != layout.input_fingerprint()


def test_a_file_is_named_by_settings_definition_and_data(values: dict[str, Any]):
    before = files_of(plan_layout(parse_recipe(values), ALIGN_FACTS))
    assert files_of(plan_layout(change(values), ALIGN_FACTS)) == before
    assert not files_of(plan_layout(change(values, limit=2), ALIGN_FACTS)) & before
    assert not files_of(plan_layout(change(values, num_fewshot=0), ALIGN_FACTS)) & before
    make_tasks(Path(values["evaluate"]["tasks"]["folder"]), target_delimiter="")
    assert not files_of(plan_layout(parse_recipe(values), ALIGN_FACTS)) & before


def test_a_task_that_cannot_be_asked_stops_the_run_before_a_cluster(values: dict[str, Any]):
    prepare_run(parse_recipe(values))
    folder = Path(values["evaluate"]["tasks"]["folder"])
    (folder / "set.jsonl").unlink()
    with pytest.raises(ValueError, match="the task choose cannot be loaded"):
        prepare_run(parse_recipe(values))
