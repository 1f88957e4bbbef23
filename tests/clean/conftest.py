"""A storage with the rows of two recipes, made once, and a copy for each test."""

import shutil
from pathlib import Path

import pytest
import yaml

from rayfuse import api
from tests.clean.storages import OTHER
from tests.stored_run import store_rows, write_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Store the rows of a recipe, and what the same recipe aligns by another method."""
    folder = tmp_path_factory.mktemp("made")
    write_run(folder)
    store_rows(api.load_run_with(folder / "recipe.yaml", [OTHER]).recipe)
    return folder


@pytest.fixture
def recipe(made: Path, tmp_path: Path) -> str:
    """Copy the storage, and return a recipe of the copy."""
    shutil.copytree(made / "storage", tmp_path / "storage")
    values = yaml.safe_load((made / "recipe.yaml").read_text())
    values["storage"] = str(tmp_path / "storage")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)
