"""A vocabulary map in progress at a limit is completed and stored, or cancelled."""

from pathlib import Path

import numpy as np
import pytest

from rayfuse.align.method import MapInputs, StoredMap
from rayfuse.align.stage import _compute_map
from rayfuse.config.models import ModelSettings, SourceSettings
from rayfuse.run.budget import Budget, Limits
from rayfuse.runtime import wait
from rayfuse.runtime.progress import StoppedEarly, report_nothing
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.store import LocalStore
from tests.inline_ray import InlineRay

MAP = StoredMap(
    list_parts=lambda _: [1, 2, 3],
    compute_part=lambda _, part: part,
    merge=sum,
    finish=lambda _, merged: np.array([merged], dtype=np.int32),
    unit="parts",
)


@pytest.fixture
def inputs(tmp_path: Path) -> MapInputs:
    corpus = DataSet(LocalStore(str(tmp_path)), "corpus", "rows", "0")
    return MapInputs(SourceSettings(name="a", model="m"), ModelSettings(model="m"), corpus)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> InlineRay:
    fake = InlineRay()
    for module in ("rayfuse.align.stage", "rayfuse.runtime.wait"):
        monkeypatch.setattr(f"{module}.ray", fake)
    return fake


def test_a_limit_does_not_drop_the_parts_of_a_map(inputs: MapInputs, fake: InlineRay):
    budget = Budget(Limits(max_hours=1.0), began=-1e9)
    watched = budget.watch(report_nothing)
    done = _compute_map(inputs, MAP, "map of a", watched, wait.TaskWait(budget.is_reached))
    assert done.tolist() == [6]
    assert not fake.cancelled


def test_a_map_that_takes_too_long_after_the_limit_is_cancelled(
    inputs: MapInputs, fake: InlineRay, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(wait, "MAX_STOP_SECONDS", 0.0)
    with pytest.raises(StoppedEarly):
        _compute_map(inputs, MAP, "map of a", report_nothing, wait.TaskWait(lambda: True))
    assert fake.cancelled == ["task 1", "task 2"]
