"""The functions of the package: light to import, equal to the commands."""

import importlib.util
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import rayfuse
from rayfuse.config.load import read_recipe
from rayfuse.config.overrides import list_changes
from tests.fakes import byte_level_tokenizer, save_tokenizer, sentencepiece_tokenizer
from tests.small_run import write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("api"))


def run_command(*arguments: str) -> dict[str, object]:
    command = [sys.executable, "-m", "rayfuse", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_package_is_imported_without_any_library_and_lists_its_names():
    program = (
        "import sys; before = set(sys.modules); import rayfuse; dir(rayfuse)\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "['rayfuse']\n"
    assert set(rayfuse.__all__) <= set(dir(rayfuse))


@pytest.mark.parametrize("name", rayfuse.__all__)
def test_every_name_exists_is_documented_and_is_no_submodule(name: str):
    assert inspect.getdoc(getattr(rayfuse, name))
    assert name not in {module.name for module in pkgutil.iter_modules(rayfuse.__path__)}


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'rayfuse' has no attribute 'open_runs'"):
        _ = rayfuse.open_runs


def test_the_package_is_marked_as_typed():
    spec = importlib.util.find_spec("rayfuse")
    assert spec is not None and spec.submodule_search_locations is not None
    assert (Path(spec.submodule_search_locations[0]) / "py.typed").is_file()


def test_changes_by_name_by_dotted_key_and_on_the_command_line_are_equal(recipe):
    expected = read_recipe(
        recipe,
        ["train.learning_rate=0.001", "train.lambda={start: 0.3, end: 0.5}", "sources.neox.gpus=1"],
    )
    train = {"learning_rate": 0.001, "lambda": {"start": 0.3, "end": 0.5}}
    by_name = rayfuse.open_run(recipe, train=train, sources={"neox": {"gpus": 1}})
    dotted = {
        "train.learning_rate": 0.001,
        "train.lambda": {"start": 0.3, "end": 0.5},
        "sources.neox.gpus": 1,
    }
    assert by_name.recipe == rayfuse.open_run(str(recipe), **dotted).recipe == expected


def test_a_dotted_key_replaces_a_dictionary_and_a_name_changes_it(recipe):
    weighted = rayfuse.open_run(recipe, **{"fuse.weights": {"neox": 2.0}}).recipe
    assert weighted.fuse.weights == {"neox": 2.0}
    assert rayfuse.open_run(weighted, fuse={"weights": {}}).recipe.fuse.weights == {"neox": 2.0}
    assert rayfuse.open_run(weighted, **{"fuse.weights": {}}).recipe.fuse.weights == {}


def test_a_recipe_is_a_file_its_values_or_a_recipe_and_is_not_changed(recipe, tmp_path):
    values = yaml.safe_load(recipe.read_text())
    before = json.dumps(values)
    changed = rayfuse.open_run(values, storage=tmp_path, corpus={"documents": [recipe]})
    assert json.dumps(values) == before
    assert changed.recipe.storage == str(tmp_path)
    assert changed.recipe.corpus.documents[0].path == str(recipe)
    assert rayfuse.open_run(values).recipe == read_recipe(recipe)
    assert rayfuse.open_run(rayfuse.open_run(values).recipe).recipe == read_recipe(recipe)


def test_changes_keep_their_order_and_the_callers_values():
    corpus = {"documents": ("a", "b")}
    found = list_changes({"seed": 1, "corpus": corpus, "train.lora": {"rank": 4}})
    assert found == [("seed", 1), ("corpus.documents", ["a", "b"]), ("train.lora", {"rank": 4})]
    assert corpus == {"documents": ("a", "b")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"lamda": 1}}, "train.lamda is no setting of rayfuse; did you mean 'lambda'"),
        ({"sources": {"gpt": {"gpus": 1}}}, "override of 'sources.gpt': the list has no item"),
        ({"seed": -1}, "seed is -1: input should be greater than or equal to 0"),
    ],
)
def test_a_wrong_change_names_the_setting_and_the_remedy(changes, message, recipe):
    with pytest.raises(rayfuse.UserError, match=message):
        rayfuse.open_run(recipe, **changes)


@pytest.mark.parametrize(("stages", "given"), [("trian", "'trian'"), ((), "empty")])
def test_a_stage_that_does_not_exist_is_refused(stages, given, recipe):
    with pytest.raises(rayfuse.UserError, match=rf"stages is {given}; the stages are corpus, "):
        rayfuse.open_run(recipe).execute(stages)


def test_a_run_returns_what_the_commands_print_and_prints_nothing(recipe, capfd):
    run = rayfuse.open_run(recipe, **{"plan.tokens": 1e9})
    plan, status, results = run.plan(), run.status(), run.results()
    assert capfd.readouterr() == ("", "")
    assert plan == run_command("plan", str(recipe), "--tokens", "1e9")
    assert set(status["data_sets"]) == {"corpus", "held-out", "capture neox", "align neox"}
    assert results == {"failed_sources": {}, "stages": dict.fromkeys(status["stages"], False)}


def test_tokenizers_are_inspected_as_by_the_command(tmp_path):
    for name, tokenizer in (("a", byte_level_tokenizer(300)), ("b", sentencepiece_tokenizer(330))):
        eos = "<|end|>" if name == "a" else "</s>"
        save_tokenizer(tokenizer, tmp_path / name, bos=None, eos=eos)
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 20)
    pair = [str(tmp_path / "a"), str(tmp_path / "b")]
    found = rayfuse.inspect_tokenizers(*pair, (tmp_path / "text.txt").read_text())
    printed = run_command("inspect", *pair, "--text", str(tmp_path / "text.txt"))
    assert found.pop("tokens_per_second") > 0 and printed.pop("tokens_per_second")
    assert json.loads(json.dumps(found)) == printed
    assert rayfuse.inspect_tokenizers(*pair)["target_tokens"] > 0
    with pytest.raises(rayfuse.UserError, match="text is empty"):
        rayfuse.inspect_tokenizers(*pair, "")
