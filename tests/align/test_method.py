"""The registry of alignment methods: a method is one module and one line."""

import subprocess
import sys

import numpy as np
import pytest

from rayfuse.align.method import Method, load_method
from rayfuse.align.task import align_committed
from rayfuse.config.align import METHODS, AlignMethod
from rayfuse.config.load import parse_recipe
from rayfuse.config.overrides import RecipeError
from rayfuse.storage.codec import flatten_column
from tests.align.test_task import make_tables, models, store_shard_3  # noqa: F401

RECIPE = {
    "storage": "s",
    "corpus": {"documents": "d"},
    "target": {"model": "t"},
    "sources": [{"name": "a", "model": "a"}],
}


@pytest.mark.parametrize("name", METHODS)
def test_a_registered_method_either_builds_its_map_or_stores_it(name):
    method = load_method(name)
    assert isinstance(method, Method)
    assert (method.build_map is None) == (method.stored_map is not None)


def test_a_method_is_added_by_one_module_and_one_registry_line(models, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(METHODS, "always_first", AlignMethod("tests.align.always_first"))
    recipe = parse_recipe(RECIPE | {"align": {"method": "always_first"}})
    tables = make_tables(models)
    task = store_shard_3(tmp_path, models, tables, method=recipe.align.method)
    commit = align_committed(task, 3)
    assert commit.stats["with_signal"] == tables["corpus"].num_rows
    has_signal, offsets = flatten_column(task.aligned.read_shard(commit), "has_signal")
    np.testing.assert_array_equal(np.flatnonzero(has_signal), offsets[:-1])


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(RecipeError, match=r"align.method is 'byte': .*'bytes', 'exact', .* or 'co"):
        parse_recipe(RECIPE | {"align": {"method": "byte"}})


def test_reading_a_recipe_imports_neither_numba_nor_an_alignment_method():
    code = (
        "import sys, rayfuse.config.load;"
        "print([name for name in sys.modules if name in ('numba', 'rapidfuzz', 'rayfuse.align')])"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.strip() == "[]"
