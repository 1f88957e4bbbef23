"""The registry of fusion rules: a rule is one function and one line."""

import numpy as np
import pytest

from rayfuse.config.fuse import RULES
from rayfuse.config.load import parse_recipe
from rayfuse.config.overrides import RecipeError
from rayfuse.fuse.rules import load_rule, mix
from rayfuse.train.batches import Packing, StepPlan, iterate_steps
from tests.train.data import open_reader, write_data

RECIPE = {
    "storage": "s",
    "corpus": {"documents": "d"},
    "target": {"model": "t"},
    "sources": [{"name": "a", "model": "a"}],
}


def average_evenly(sources, at, selected, settings):
    """A fusion rule for tests: the mean of the active sources, whatever their NLL."""
    del selected
    is_active = np.stack([np.isfinite(source.nll[at]) for source in sources])
    weights = is_active / np.maximum(is_active.sum(axis=0), 1)
    return mix([source.read(at, settings) for source in sources], weights)


@pytest.mark.parametrize("name", RULES)
def test_every_registered_rule_is_a_function(name):
    assert callable(load_rule(name))


def test_a_rule_is_added_by_one_function_and_one_registry_line(tmp_path, monkeypatch):
    monkeypatch.setitem(RULES, "even", "tests.fuse.test_added_rule:average_evenly")
    settings = parse_recipe(RECIPE | {"fuse": {"method": "even"}}).fuse
    corpus, aligned = write_data(tmp_path, [[5, 7], [9]])
    reader = open_reader(corpus, aligned, settings)
    plan = StepPlan(seed=0, epochs=1, rows_per_step=3)
    packing = Packing(sequence_tokens=32, sequences=1, is_packed=True)
    (step,) = iterate_steps(reader, packing, plan, rank=0, num_workers=1)
    assert sum(len(batch.positions) for batch in step.batches) == 5 + 7 + 9 - 3
    reader.keep({0, 1})
    rows = reader.read_rows(np.array([[0, 0], [0, 1], [1, 0]]))
    mass = rows.top.probs.sum(axis=1) + rows.top.tail
    np.testing.assert_allclose(mass, rows.has_signal.astype(float), atol=1e-3)
    assert rows.has_signal.any()


def test_an_unknown_rule_is_refused_with_the_known_ones():
    with pytest.raises(RecipeError, match=r"'max_ce': .*'min_ce', 'avg_ce' or 'fixed_share'"):
        parse_recipe(RECIPE | {"fuse": {"method": "max_ce"}})
