"""`rayfuse init` fills in what the files of models state."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import rayfuse
from rayfuse.config.recipe import Recipe
from rayfuse.config.template import read_template
from rayfuse.plan.model_size import ModelSize
from rayfuse.plan.starter import _choose_names, _fill_in_workers, _read_facts
from tests.fakes import byte_level_tokenizer, save_model, save_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save two models, one of them with a card, in a folder whose name YAML needs quotes for."""
    root = tmp_path_factory.mktemp("models") / "a: b #c"
    for family, name in (("gpt2", "Small GPT"), ("llama", "target")):
        save_model(family, 300, root / name)
        save_tokenizer(byte_level_tokenizer(300), root / name, bos="<|end|>", eos="<|end|>")
    (root / "Small GPT" / "README.md").write_text("---\nlicense: gpl-3.0\n---\n")
    return root


def test_without_models_it_is_the_template():
    assert rayfuse.write_recipe() == read_template()


def test_models_are_filled_in_with_what_their_files_state(models: Path):
    target, source = str(models / "target"), str(models / "Small GPT")
    text = rayfuse.write_recipe(target, [source, target])
    recipe = Recipe.model_validate(yaml.safe_load(text))
    assert recipe.target.model == target
    assert [(one.name, one.model, one.gpus) for one in recipe.sources] == [
        ("small-gpt", source, 1.0),
        ("self", target, 1.0),
    ]
    contexts = [_read_facts("--target", model).files.context_tokens for model in (source, target)]
    assert recipe.corpus.max_tokens == min(context for context in contexts if context) < 2048
    assert recipe.train.num_workers == 1
    lines = text.splitlines()
    (line,) = [line for line in lines if "licence gpl-3.0" in line]
    assert "training on its outputs: yes, if the new model has the same licence" in line
    assert sum("no model card was found" in line for line in lines) == 2
    kept = read_template().partition("capture:")[2].replace("num_workers: 8", "num_workers: 1")
    assert text.partition("capture:")[2] == kept


@pytest.mark.parametrize(
    ("billions", "expected"),
    [(1, (1, 2, "")), (70, (16, 3, "")), (405, (128, 3, "")), (9000, (8, 2, "do not hold"))],
)
def test_workers_are_as_many_as_hold_the_target(
    billions: int, expected: tuple[int, int, str], models: Path
):
    size = replace(_read_facts("--target", str(models / "target")).size, parameters=billions * 1e9)
    text = _fill_in_workers(size, read_template())
    train = Recipe.model_validate(yaml.safe_load(text)).train
    assert (train.num_workers, train.zero_stage) == expected[:2]
    assert expected[2] in text
    assert ("do not hold" in text) == bool(expected[2])


def test_one_kind_of_model_leaves_the_others_as_in_the_template(models: Path):
    text = rayfuse.write_recipe(sources=[str(models / "target")])
    recipe = Recipe.model_validate(yaml.safe_load(text))
    assert recipe.target == Recipe.model_validate(yaml.safe_load(read_template())).target
    assert [one.name for one in recipe.sources] == ["source-target"]
    assert recipe.train.num_workers == 8


def test_names_are_allowed_and_different():
    names = _choose_names(["org/A", "other/a", "x/fused-b", "y/???", "t", "x/Merged"], "t")
    assert names == ["a", "a-2", "source-fused-b", "source", "self", "source-merged"]
    for name in names:
        Recipe.model_validate(
            {
                "storage": "s",
                "corpus": {"documents": "d", "max_tokens": 16},
                "target": {"model": "t"},
                "sources": [{"name": name, "model": "m"}],
            }
        )


def test_gpus_follow_from_the_size(models: Path):
    facts = _read_facts("--target", str(models / "target"))
    counts = {
        parameters: replace(
            facts, size=ModelSize(parameters, parameters, 32, 4096, 32_000)
        ).count_gpus()
        for parameters in (1e9, 7e9, 34e9, 70e9, 405e9)
    }
    assert counts == {1e9: 1, 7e9: 1, 34e9: 1, 70e9: 2, 405e9: 16}


def test_a_model_that_cannot_be_read_is_named_with_its_option():
    command = [sys.executable, "-m", "rayfuse", "init", "--source", "/nowhere/model"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(
        "rayfuse: error: --source /nowhere/model: model is '/nowhere/model', a folder that does"
    )
