"""Damage of a run's shards: training refuses it, `verify` names it, `verify --repair` heals it."""

from pathlib import Path

import pytest

from rayfuse.config.recipe import Recipe
from rayfuse.pipeline import prepare_run, run_stages
from rayfuse.run.layout import Layout
from rayfuse.runtime.progress import report_nothing
from rayfuse.status import repair_layout, verify_layout
from rayfuse.storage.dataset import DataSet
from tests.run.test_segmentation import folder, write_recipe
from tests.storage.test_verify import (
    flip_a_bit,
    path_of,
    put_another_models_shard,
    swap_files,
    truncate,
)

pytestmark = pytest.mark.ray

__all__ = ["folder"]  # a fixture

DAMAGES = {flip_a_bit: {1}, truncate: {1}, swap_files: {1, 2}, put_another_models_shard: {1}}


@pytest.fixture(scope="module")
def recipe(folder, tmp_path_factory, ray_cluster) -> Recipe:
    recipe = write_recipe(folder, tmp_path_factory.mktemp("repair"), "a", "b", shard_tokens=400)
    # Damage does not go away by trying again.
    recipe = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"max_failures": 0})}
    )
    run(recipe, "corpus", "capture", "align")
    return recipe


def run(recipe: Recipe, *stages: str) -> Layout:
    layout = prepare_run(recipe)
    run_stages(recipe, layout, stages, report_nothing, lambda _: None)
    return layout


def read_all(layout: Layout) -> dict[str, dict[int, bytes]]:
    sets = (layout.corpus, *layout.captured.values(), *layout.aligned.values())
    return {
        data.folder: {shard: path_of(data, shard).read_bytes() for shard in data.commits()}
        for data in sets
    }


def pick(layout: Layout, stage: str) -> DataSet:
    return {"corpus": layout.corpus, "align": layout.aligned["a"]}.get(stage, layout.captured["a"])


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_fault_12_training_refuses_and_repair_heals(damage, recipe):
    layout = prepare_run(recipe)
    sound = read_all(layout)
    assert len(layout.aligned["a"].commits()) > 3
    damage(layout.aligned["a"])
    with pytest.raises(Exception, match="run `rayfuse") as error:
        run(recipe, "train")
    assert layout.aligned["a"].folder in str(error.value)
    found = verify_layout(layout, report_nothing)
    assert {name for name, each in found.items() if each.corrupt} == {"align a"}
    assert {each.shard for each in found["align a"].corrupt} == DAMAGES[damage]
    stages = repair_layout(recipe, layout, found)
    assert stages == ["align"]
    run(recipe, *stages)
    assert not any(each.corrupt for each in verify_layout(layout, report_nothing).values())
    assert read_all(layout) == sound


@pytest.mark.parametrize(
    ("stage", "damage"),
    [("corpus", flip_a_bit), *(("capture", damage) for damage in DAMAGES)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_fault_12_repair_makes_exactly_the_damaged_shards_again(stage, damage, recipe):
    layout = prepare_run(recipe)
    sound = read_all(layout)
    data = pick(layout, stage)
    made = {shard: commit.attempt for shard, commit in data.commits().items()}
    damage(data)
    found = verify_layout(layout, report_nothing)
    (name,) = (name for name, each in found.items() if each.corrupt)
    assert name == {"corpus": "corpus", "capture": "capture a"}[stage]
    assert {each.shard for each in found[name].corrupt} == DAMAGES[damage]
    run(recipe, *repair_layout(recipe, layout, found))
    assert read_all(layout) == sound
    again = {shard for shard, commit in data.commits().items() if commit.attempt != made[shard]}
    assert again == DAMAGES[damage]


def test_a_bad_shard_is_named_by_its_path(recipe):
    layout = prepare_run(recipe)
    flip_a_bit(layout.captured["b"])
    found = verify_layout(layout, report_nothing)
    (damage,) = found["capture b"].corrupt
    assert Path(layout.store.root, damage.file) == path_of(layout.captured["b"], 1)
    run(recipe, *repair_layout(recipe, layout, found))
