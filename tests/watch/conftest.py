"""The rows of a small run, stored once and copied for each test."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from rayfuse.config.load import change_values
from rayfuse.config.recipe import Recipe
from rayfuse.watch.command import open_server
from rayfuse.watch.server import WatchServer
from tests.stored_run import write_run


@pytest.fixture(scope="package")
def stored(tmp_path_factory) -> Recipe:
    """A run whose corpus, captures and alignments are stored; nothing is trained."""
    return write_run(tmp_path_factory.mktemp("stored"))


@pytest.fixture
def recipe(stored: Recipe, tmp_path: Path) -> Recipe:
    """The same run in a storage of the test's own."""
    shutil.copytree(stored.storage, tmp_path / "storage")
    return move(stored, str(tmp_path / "storage"))


def move(recipe: Recipe, storage: str, **changes: object) -> Recipe:
    """Give a recipe another storage, and other settings by dotted key."""
    values = recipe.model_dump(mode="json", by_alias=True)
    return change_values(values, [("storage", storage), *changes.items()])


@contextmanager
def serve(recipe: Recipe) -> Iterator[WatchServer]:
    """Serve the page of a run."""
    with open_server(recipe, 0) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
