"""Mutated recipes and overrides: a recipe, or a `RecipeError` that names the setting."""

from pathlib import Path

import yaml
from hypothesis import given
from hypothesis import strategies as st

from rayfuse.config.base import UserError
from rayfuse.config.load import read_recipe
from rayfuse.config.recipe import Recipe, dump_recipe
from tests.fuzz.mutations import VALUES, edits, fuzz, json_edits, mutate_bytes, mutate_json

ROOT = Path(__file__).parents[2]
SEEDS = sorted((ROOT / "recipes").glob("*.yaml"))


def read(path: Path, overrides: list[str] | None = None) -> None:
    try:
        recipe = read_recipe(path, overrides)
    except UserError as error:
        assert str(error).strip() and len(str(error)) < 20_000
        return
    assert Recipe.model_validate(dump_recipe(recipe)) == recipe


@fuzz(80)
@given(st.sampled_from(SEEDS), edits)
def test_a_recipe_with_mutated_bytes(tmp_path_factory, seed, drawn):
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(mutate_bytes(seed.read_bytes(), drawn))
    read(path)


@fuzz(100)
@given(st.sampled_from(SEEDS), json_edits)
def test_a_recipe_with_mutated_values(tmp_path_factory, seed, drawn):
    path = tmp_path_factory.getbasetemp() / "values.yaml"
    path.write_bytes(mutate_json(yaml.safe_load(seed.read_text()), drawn))
    read(path)


SETTINGS = ("seed", "train.lambda", "fuse.weights", "corpus.documents", "sources.0.gpus", "a.b", "")


@fuzz(80)
@given(st.sampled_from(SETTINGS), st.sampled_from(VALUES) | st.text(max_size=30))
def test_an_override_with_any_value(setting, value):
    read(SEEDS[0], [f"{setting}={value}"])
