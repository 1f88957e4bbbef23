"""Damage of maps, models, scores and the report: `verify` names it, `verify --repair` heals it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rayfuse.config.load import read_recipe
from rayfuse.config.recipe import Recipe
from rayfuse.pipeline import STAGES, is_stage_done, prepare_run, run_stages
from rayfuse.run.layout import Layout
from rayfuse.run.made_models import read_done
from rayfuse.runtime.progress import report_nothing
from rayfuse.status import repair_layout, verify_layout
from tests.small_run import write_recipe

pytestmark = pytest.mark.ray

SETTINGS = ["align.method=min_edit_distance", "train.num_workers=1", "train.max_failures=0"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, ray_cluster) -> Recipe:
    """A finished run."""
    folder = tmp_path_factory.mktemp("results")
    path = write_recipe(folder)
    target = f"target.model={os.path.relpath(folder / 'target')}"  # the same for all workers
    recipe = read_recipe(path, [*SETTINGS, target])
    (folder / "target/additional_chat_templates").mkdir()
    (folder / "target/additional_chat_templates/tools.jinja").write_text("{{ tools }}")
    run_stages(recipe, prepare_run(recipe), STAGES, report_nothing, lambda _: None)
    return recipe


def list_results(layout: Layout) -> dict[str, tuple[str, str]]:
    """Name one file of each kind, and the stage that writes it."""
    run = layout.runs[0]
    (map_file,) = layout.map_files.values()
    score = layout.evaluation.scores["fused"]
    return {
        "weights": ("train", f"{run.folder}/model/model.safetensors"),
        "config": ("train", f"{run.folder}/model/config.json"),
        "record of a model": ("train", f"{run.folder}/done.json"),
        "metrics": ("train", f"{run.folder}/metrics.jsonl"),
        "map": ("align", map_file),
        "record of a map": ("align", map_file.replace(".parquet", ".json")),
        "score": ("evaluate", score),
        "findings": ("report", "report/findings.json"),
        "page": ("report", "report/index.html"),
        "table": ("report", "report/table.md"),
        "model card": ("report", f"{run.folder}/model/README.md"),
    }


KINDS = (
    *("weights", "config", "record of a model", "metrics", "map", "record of a map"),
    *("score", "findings", "page", "table", "model card"),
)
RECORDS = ("record of a model", "score", "findings")
"""Without its record a result does not exist: the stage is not done."""

UNNEEDED = ("record of a map",)
"""Without its record a map is made again when a shard is aligned; those that are stay as good."""


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], None]] = {"flip": flip_a_bit, "cut": cut, "remove": os.remove}


def test_a_model_is_published_with_all_chat_templates_of_the_target(recipe):
    layout = prepare_run(recipe)
    name = "model/additional_chat_templates/tools.jinja"
    for run in layout.runs:
        assert layout.store.read(f"{run.folder}/{name}") == b"{{ tools }}"
        record = read_done(layout.store, run.folder)
        assert record is not None
        assert name in record["files"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_damage_of_a_result_is_named_or_its_stage_is_not_done(kind, damage, recipe):
    layout = prepare_run(recipe)
    stage, file = list_results(layout)[kind]
    path = Path(layout.store.root, file)
    content = path.read_bytes()
    try:
        DAMAGES[damage](path)
        if kind in RECORDS and damage == "remove":
            assert not is_stage_done(stage, layout)
            return
        found = verify_layout(layout, report_nothing)
        named = {fault.file for each in found.values() for fault in each.corrupt}
        if kind in UNNEEDED and damage == "remove":
            assert is_stage_done(stage, layout)
            assert not named
            return
        if kind == "model card":
            assert named == {"report/findings.json"}  # with it the card is written again
            return
        assert file in named
        assert {name.split("/")[0] for name in named} == {file.split("/")[0]}
    finally:
        path.write_bytes(content)


def test_two_models_that_changed_places_are_named(recipe):
    layout = prepare_run(recipe)
    fused, clm = (Path(layout.store.root, run.folder, "model") for run in layout.runs)
    aside = fused.with_name("aside")
    fused.rename(aside)
    clm.rename(fused)
    aside.rename(clm)
    found = verify_layout(layout, report_nothing)
    named = {fault.file for each in found.values() for fault in each.corrupt}
    fused.rename(aside)
    clm.rename(fused)
    aside.rename(clm)
    assert {f"{run.folder}/model/model.safetensors" for run in layout.runs} <= named


def test_a_repair_makes_every_damaged_result_again(recipe):
    layout = prepare_run(recipe)
    results = list_results(layout)
    for kind in ("weights", "map", "score", "page"):
        flip_a_bit(Path(layout.store.root, results[kind][1]))
    found = verify_layout(layout, report_nothing)
    stages = repair_layout(recipe, layout, found)
    assert stages == ["align", "train", "evaluate", "report"]
    run_stages(recipe, layout, tuple(stages), report_nothing, lambda _: None)
    assert not any(each.corrupt for each in verify_layout(layout, report_nothing).values())
    assert all(is_stage_done(stage, layout) for stage in STAGES)
