"""The targets to merge share all rows of the complete recipe; every setting has its own folders."""

from pathlib import Path
from typing import Any

import pytest

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.clean.used import list_used
from rayfuse.config.base import UserError
from rayfuse.config.load import change_values
from rayfuse.config.merge import METHODS
from rayfuse.config.overrides import RecipeError
from rayfuse.config.recipe import Recipe
from rayfuse.merge.command import merge_recipe
from rayfuse.merge.plan import MergePlan, NothingToMergeError, plan_merge
from rayfuse.run.layout import plan_layout
from rayfuse.run.segmentation import write_segmentation
from rayfuse.runtime.console import PlainConsole
from rayfuse.storage.items import list_stored
from tests.stored_run import write_run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return write_run(tmp_path_factory.mktemp("run"))


def change(recipe: Recipe, **changes: Any) -> Recipe:
    values = recipe.model_dump(mode="json", by_alias=True)
    return change_values(
        values, [(key.replace("__", "."), value) for key, value in changes.items()]
    )


def plan(recipe: Recipe, **changes: Any) -> MergePlan:
    changed = change(recipe, **changes)
    return plan_merge(changed, plan_layout(changed, ALIGN_FACTS))


def test_cleaning_keeps_what_a_refused_setting_of_merge_hides(recipe: Recipe):
    """The folders have no names then, so that all of them would look unused."""
    refused = change(recipe, merge__weights={"neox": 0, "gpt2": 0})
    layout = plan_layout(refused, ALIGN_FACTS)
    with pytest.raises(UserError, match=r"merge\.weights"):
        list_used(refused, layout)
    single = change(recipe, fuse__weights={"gpt2": 0})
    with pytest.raises(NothingToMergeError, match="needs 2 sources"):
        plan_merge(single, layout)
    assert plan(recipe).list_items() <= list_used(recipe, plan_layout(recipe, ALIGN_FACTS))
    assert not any(item.startswith("merge/") for item in list_used(single, layout))


def test_each_target_is_trained_on_the_rows_of_the_complete_recipe(recipe: Recipe):
    layout = plan_layout(recipe, ALIGN_FACTS)
    pairs = plan(recipe).pairs
    assert [pair.source for pair in pairs] == ["neox", "gpt2"]
    for pair in pairs:
        assert pair.layout.corpus == layout.corpus
        assert pair.layout.held_out == layout.held_out
        assert pair.layout.aligned == {pair.source: layout.aligned[pair.source]}
        assert pair.layout.captured == {pair.source: layout.captured[pair.source]}
        assert [source.name for source in pair.recipe.sources] == [pair.source]
    folders = {run.folder for run in layout.runs} | {pair.run.folder for pair in pairs}
    assert len(folders) == len(layout.runs) + 2


def test_a_target_is_that_of_a_recipe_with_its_source_alone(recipe: Recipe):
    """Whether it was trained by `rayfuse train` or by `rayfuse merge`, it is trained once."""
    layout = plan_layout(recipe, ALIGN_FACTS)
    for documents in (layout.corpus_documents, layout.held_out_documents):
        write_segmentation(layout.store, documents.segmentation)
    pairs = {pair.source: pair.run.folder for pair in plan(recipe).pairs}
    for name, folder in pairs.items():
        sources = [s.model_dump(mode="json") for s in recipe.sources if s.name == name]
        alone = plan_layout(change(recipe, sources=sources), ALIGN_FACTS)
        assert alone.runs[0].folder == folder


VALUES: dict[str, Any] = {
    "weights": {"gpt2": 2.0},
    "t": 0.25,
    "scale": 0.5,
    "density": 0.2,
    "tau": 0.9,
    "seed": 1,
}


@pytest.mark.parametrize("setting", [*VALUES])
def test_a_setting_changes_the_folders_of_the_methods_that_read_it(recipe: Recipe, setting: str):
    before = plan(recipe).layout.evaluation.merged_pairs
    changed = plan(recipe, **{f"merge__{setting}": VALUES[setting]})
    after = changed.layout.evaluation.merged_pairs
    moved = {name.removeprefix("merged-") for name in before if before[name] != after[name]}
    assert moved == {name for name, method in METHODS.items() if setting in method.settings}
    assert moved
    scores = changed.layout.evaluation.scores
    assert {n for n, f in plan(recipe).layout.evaluation.scores.items() if f != scores[n]} == {
        f"merged-{name}" for name in moved
    }


def test_every_setting_of_the_section_has_a_method_that_reads_it():
    read = {setting for method in METHODS.values() for setting in method.settings}
    assert read == {*VALUES}


def test_a_change_of_training_moves_targets_merges_and_results(recipe: Recipe):
    before, after = plan(recipe), plan(recipe, train__learning_rate=1e-3)
    unmoved = before.list_items() & after.list_items()
    target = before.layout.evaluation.scores["target"].removesuffix(".json")
    assert unmoved == {target}


def test_what_merge_makes_is_in_use_for_clean(recipe: Recipe):
    made = plan(recipe)
    used = list_used(recipe, plan_layout(recipe, ALIGN_FACTS))
    assert made.list_items() <= used
    alone = change(recipe, sources=[recipe.sources[0].model_dump(mode="json")])
    assert list_used(alone, plan_layout(alone, ALIGN_FACTS))  # one source: nothing to merge


def test_slerp_is_made_of_two_models_alone(recipe: Recipe):
    assert list(plan(recipe).merges.values()) == [*METHODS]
    third = recipe.sources[0].model_dump(mode="json") | {"name": "third"}
    sources = [*(source.model_dump(mode="json") for source in recipe.sources), third]
    assert [*METHODS] == [*plan(recipe, merge__methods=[*METHODS]).merges.values()]
    assert "slerp" not in plan(recipe, sources=sources).merges.values()
    with pytest.raises(UserError, match=r"has slerp, which merges 2 models, but there are 3"):
        plan(recipe, sources=sources, merge__methods=["slerp"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fuse__weights": {"gpt2": 0}}, "needs 2 sources or more, .* has 1: neox; add sources"),
        ({"train__lambda": 1}, r"train\.lambda is 1, so that all targets"),
        ({"target__adapter": "folder"}, r"target\.adapter is 'folder', which is not in"),
        ({"merge__weights": {"neox": 0, "gpt2": 0}}, "each of neox, gpt2 the weight 0"),
    ],
)
def test_recipes_that_cannot_be_merged_are_refused(
    recipe: Recipe, changes: dict[str, Any], message: str
):
    layout = plan_layout(recipe, ALIGN_FACTS)
    with pytest.raises(UserError, match=message):
        plan_merge(change(recipe, **changes), layout)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge__methods": ["tis"]}, "input should be 'linear', 'slerp'"),
        ({"merge__methods": ["ties", "ties"]}, "'ties' is listed twice"),
        ({"merge__density": 0}, "greater than 0"),
        ({"merge__t": 1.5}, "less than or equal to 1"),
        ({"merge__weights": {"other": 1}}, r"merge\.weights names 'other', which is no source"),
    ],
)
def test_settings_out_of_range_are_refused(recipe: Recipe, changes: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message):
        change(recipe, **changes)


def test_rows_that_are_not_captured_are_named_with_the_remedy(recipe: Recipe, tmp_path: Path):
    empty = change(recipe, storage=str(tmp_path / "empty"))
    message = r"stage corpus is incomplete in .*/empty, .* run `rayfuse run my.yaml` first"
    with pytest.raises(UserError, match=message):
        merge_recipe(empty, PlainConsole(None, quiet=True), file="my.yaml")
    alone = change(recipe, sources=[recipe.sources[0].model_dump(mode="json")])
    with pytest.raises(UserError, match="needs 2 sources or more"):
        merge_recipe(alone, PlainConsole(None, quiet=True))


def test_clean_finds_merges_and_results_that_no_recipe_uses(recipe: Recipe):
    made = plan(recipe)
    store = made.layout.store
    files = {
        f"{made.folder_of('merged-ties')}/done.json": b"{}",
        "merge/ties-0123456789ab/done.json": b"{}",
        "merge/ties-0123456789ab/model/model.safetensors": b"weights",
        made.results_file: b"{}",
        "merge/results-0123456789ab.json": b"{}",
        "merge/notes.txt": b"not ours",
    }
    for name, content in files.items():
        store.write(name, content)
    used = list_used(recipe, plan_layout(recipe, ALIGN_FACTS))
    found = {item.name: item for item in list_stored(store, lambda name: name in used)}
    unused = {name for name in found if name.startswith("merge/")}
    assert unused == {"merge/ties-0123456789ab", "merge/results-0123456789ab"}
    assert found["merge/ties-0123456789ab"].is_complete
    assert not found["merge/ties-0123456789ab"].is_training
    for name in files:
        store.remove(name)
