"""Recipes of the repository are valid, cost what they state, and run with tiny random models.

Only paths, models and sizes differ from the files: with a GPU and a hub they run as they are.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

import rayfuse
from docs.recipe_costs import CONFIGS, PAGE, PLANNED, insert_table, render_line
from rayfuse.config.load import read_recipe
from rayfuse.pipeline import STAGES
from tests.chaos.runs import IS_LONG
from tests.models.families import FAMILIES
from tests.recipes.stand_ins import STAND_INS, save_stand_ins, write_documents, write_store

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "recipes").glob("*.yaml"))

ALWAYS = ("paper", "multilingual", "lora-7b")
"""The recipes that differ most; the others run with the long tests."""

only_long = pytest.mark.skipif(
    not IS_LONG, reason="half a minute each, like others that always run; RAYFUSE_LONG_CHAOS=1"
)

ENGLISH = [
    "All human beings are born free and equal in dignity and rights. ",
    "They are endowed with reason and conscience and should act in a spirit of brotherhood. ",
    "Article 12 has 3 parts, and 45 + 30 = 75.\n",
]
LANGUAGES = {
    "es": [
        "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como ",
        "están de razón y conciencia, deben comportarse fraternalmente los unos con los otros.\n",
    ],
    "hi": ["सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।\n"],
    "zh": [
        "人人生而自由，在尊严和权利上一律平等。",
        "他们赋有理性和良心，并应以兄弟关系的精神相对待。\n",
    ],
}


def read_texts(name: str) -> list[str]:
    """Return documents for a recipe: prose, or the code of this package."""
    if name != "code":
        return [ENGLISH[i % 3] * (2 + i % 4) for i in range(24)]
    files = sorted((ROOT / "rayfuse" / "align").rglob("*.py"))
    return [file.read_text()[:500] for file in files][:24]


def write_corpus(name: str, values: dict[str, Any], folder: Path) -> list[str]:
    """Write a recipe's documents where it then looks for them; return the texts."""
    given = values["corpus"]["documents"]
    if not isinstance(given, list):
        entry: dict[str, Any] = {"path": given} if isinstance(given, str) else given
        texts = read_texts(name)
        write_documents(folder / "docs.jsonl", texts, entry.get("text", "text"))
        values["corpus"]["documents"] = entry | {"path": str(folder / "docs.jsonl")}
        return texts
    texts = []
    for entry in given:
        language = Path(entry["path"]).parent.name
        own = [LANGUAGES[language][i % len(LANGUAGES[language])] * 2 for i in range(8)]
        write_documents(folder / language / "docs.jsonl", own)
        entry["path"] = str(folder / language / "*.jsonl")
        texts += own
    return texts


def cut_sizes(values: dict[str, Any], folders: dict[str, str], folder: Path) -> None:
    """Replace a recipe's models and storage, and cut what makes it large."""
    values["storage"] = str(folder / "storage")
    values["corpus"] |= {"max_tokens": 64, "shard_tokens": 4000}
    values["target"]["model"] = folders[values["target"]["model"]]
    for source in values["sources"]:
        source |= {"model": folders[source["model"]], "gpus": 0, "max_actors": 1}
    train = values.setdefault("train", {})
    train |= {"rows_per_step": 16, "num_workers": 1, "gpus_per_worker": 0}
    train |= {"epochs": min(train.get("epochs", 1), 2)}
    train |= {"validate_every_steps": 4, "validation_rows": 4}
    values.setdefault("evaluate", {})
    values["evaluate"] |= {"held_out_share": 0.25, "bootstrap_samples": 50}
    values.setdefault("fuse", {})["skip_noise"] = False  # random weights are noise


def read_values(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())


def list_models(values: dict[str, Any]) -> list[str]:
    return [values["target"]["model"], *(source["model"] for source in values["sources"])]


def check_results(values: dict[str, Any], results: dict[str, Any]) -> None:
    """Check that all stages are complete, and every model that ran is evaluated."""
    assert results["stages"] == dict.fromkeys(STAGES, True)
    run = {source["name"] for source in values["sources"] if "captured_from" not in source}
    expected = {"target", "clm", "fused"} | run - {"self"}
    assert expected <= results["models"].keys(), results["models"].keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_is_valid_and_every_model_is_of_a_tested_family(file: Path):
    recipe = read_recipe(file)
    for model in (recipe.target, *recipe.sources):
        family = STAND_INS[model.model].family
        assert family in FAMILIES
        assert CONFIGS.get(model.model, {"model_type": family})["model_type"] == family


@pytest.mark.parametrize("name", PLANNED)
def test_the_cost_at_the_top_of_a_recipe_is_what_plan_estimates(name: str):
    assert render_line(name) in (ROOT / "recipes" / f"{name}.yaml").read_text().splitlines()


def test_the_table_of_recipes_is_current():
    page = PAGE.read_text()
    assert insert_table(page) == page, "run `python -m docs.recipe_costs`"


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ALWAYS else only_long)
        for name in PLANNED
        if name != "imported-store"
    ],
)
def test_a_recipe_runs_with_models_of_the_same_architectures(name, tmp_path, ray_cluster):
    values = read_values(name)
    texts = write_corpus(name, values, tmp_path)
    folders = save_stand_ins(list_models(values), texts, tmp_path / "models")
    cut_sizes(values, folders, tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    check_results(values, rayfuse.open_run(path).execute(quiet=True))


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_recipe_trains_on_the_store_of_another_tool(tmp_path, ray_cluster):
    values = read_values("imported-store")
    texts = [f"{i}. {text}"[:160] for i, text in enumerate(read_texts("imported-store"))]
    folders = save_stand_ins(list_models(values), texts, tmp_path / "models")
    large = Path(folders[values["sources"][0]["model"]])
    write_store(large, texts, tmp_path / "logits")
    documents = str(tmp_path / "texts.jsonl")
    assert rayfuse.import_store(str(tmp_path / "logits"), documents, str(large))
    cut_sizes(values, folders, tmp_path)
    values["corpus"] |= {"documents": documents, "max_tokens": 256}
    values["sources"][0]["captured_from"] = str(tmp_path / "logits")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    results = rayfuse.open_run(path).execute(quiet=True)
    check_results(values, results)
    assert results["llama70"]["rejects"] == 0
    assert "llama70" not in results["models"]
