import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayfuse.recipe import Recipe, RecipeError, dump_recipe, parse_recipe, read_recipe

ROOT = Path(__file__).parents[1]

MINIMAL: dict[str, Any] = {
    "storage": "run",
    "corpus": {"documents": "docs.jsonl"},
    "target": {"model": "t"},
    "sources": [{"name": "a", "model": "m"}],
}


def with_setting(path: str, value: Any) -> dict[str, Any]:
    values = json.loads(json.dumps(MINIMAL))
    *sections, last = path.split(".")
    place = values
    for part in sections:
        place = place[int(part)] if part.isdigit() else place.setdefault(part, {})
    place[last] = value
    return values


def test_a_minimal_recipe_has_a_default_for_all_the_rest():
    recipe = parse_recipe(MINIMAL)
    assert recipe.capture.top_k == 16
    assert recipe.corpus.documents[0].path == "docs.jsonl"


def test_a_dumped_recipe_reads_back_as_the_same_recipe():
    recipe = parse_recipe(with_setting("train.lambda", 0.7))
    assert parse_recipe(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.lamda", 0.9, r"train.lamda is no setting of rayfuse; did you mean 'lambda'\?"),
        ("captur", {}, r"captur is no setting of rayfuse; did you mean 'capture'\?"),
        ("sources.0.gpu", 1, r"sources.0.gpu is no setting .* did you mean 'gpus'\?"),
        ("train.lambda", 1.5, r"train.lambda is 1.5: input should be less than or equal to 1"),
        ("capture.top_k", "many", r"capture.top_k is 'many': input should be a valid integer"),
        ("align.method", "magic", r"align.method is 'magic': input should be 'bytes'"),
        ("sources.0.name", "../x", r"sources.0.name is '../x': use letters"),
        ("sources.0.name", "fused", r"are names rayfuse uses itself"),
        ("train.rows_per_step", 129, None),
        ("train", {"rows_per_step": 10, "micro_batch_rows": 4}, r"no multiple .* use 12"),
        ("sources", [], r"sources is \[\]"),
        ("corpus.documents", [], r"corpus.documents is \[\]"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_the_remedy(path, value, message):
    values = with_setting(path, value)
    if message is None:
        assert parse_recipe(values).train.rows_per_step == value
        return
    with pytest.raises(RecipeError, match=message):
        parse_recipe(values)


def test_two_sources_of_one_name_are_refused():
    values = with_setting("sources", [{"name": "a", "model": "m"}, {"name": "a", "model": "n"}])
    with pytest.raises(RecipeError, match="two sources are called 'a'"):
        parse_recipe(values)


def test_a_missing_setting_is_named():
    values = {key: value for key, value in MINIMAL.items() if key != "target"}
    with pytest.raises(RecipeError, match="target is missing"):
        parse_recipe(values)


def test_all_faults_are_told_at_once():
    values = with_setting("train.lambda", 2) | {"seeed": 1}
    with pytest.raises(RecipeError, match=r"(?s)train.lambda.*seeed|seeed.*train.lambda"):
        parse_recipe(values)


def test_overrides_reach_sections_lists_and_names(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    recipe = read_recipe(
        path, ["train.lambda=0.9", "sources.a.gpus=0.5", "sources.0.model=z", "seed=3"]
    )
    assert recipe.train.clm_weight == 0.9
    assert (recipe.sources[0].gpus, recipe.sources[0].model, recipe.seed) == (0.5, "z", 3)


@pytest.mark.parametrize("override", ["train.lambda", "=3", "sources.b.gpus=1", "storage.x=1"])
def test_an_override_that_fits_nowhere_is_refused(override, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(RecipeError, match="override"):
        read_recipe(path, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("", "holds no settings"),
        ("- 1", "holds no settings"),
        ("a: !!python/object:os.system {}", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text, message, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere.yaml cannot be read"):
        read_recipe(tmp_path / "nowhere.yaml")


def test_the_schema_for_editors_is_that_of_the_recipe():
    stored = json.loads((ROOT / "recipes/schema.json").read_text())
    assert stored == Recipe.model_json_schema(by_alias=True), "run `make schema`"


def test_every_recipe_in_the_repository_can_be_read():
    paths = sorted((ROOT / "recipes").glob("*.yaml"))
    assert paths
    for path in paths:
        read_recipe(path)
