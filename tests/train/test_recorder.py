"""The best validation: the lowest, the earliest of equals, never one that is not finite."""

import math
from pathlib import Path

import pytest

from rayfuse.config.load import parse_recipe
from rayfuse.run.layout import TrainRun
from rayfuse.storage.store import LocalStore
from rayfuse.train.process_group import ProcessGroup
from rayfuse.train.recorder import MetricsRecorder
from rayfuse.train.trackers import Trackers
from tests.fuse.test_added_rule import RECIPE


def record(validations: dict[int, float], folder: Path) -> MetricsRecorder:
    """Record validations by step, as a worker does that is not rank 0."""
    run = TrainRun("fused", "train/fused-0", "0", True)
    recipe = parse_recipe(RECIPE)
    group = ProcessGroup(rank=1, num_workers=2, local_rank=1, scratch=folder)
    trackers = Trackers(recipe, run, is_on=False)
    recorder = MetricsRecorder(run, LocalStore(str(folder)), None, trackers, group)
    for step in range(1, max(validations) + 1):
        recorder.records.append({"step": step})
        if step in validations:
            recorder.record_validation(step, validations[step])
    return recorder


@pytest.mark.parametrize(
    ("validations", "best", "since"),
    [
        ({5: 2.0, 10: 1.0, 15: 1.5, 20: 1.2}, 10, 2),
        ({5: 1.0, 10: 1.0}, 5, 1),
        ({5: math.nan, 10: 1.0, 15: 0.9}, 15, 0),
        ({5: math.inf, 10: math.nan}, 5, 1),
    ],
)
def test_the_best_step_is_the_same_after_a_resume(validations, best, since, tmp_path):
    recorder = record(validations, tmp_path)
    resumed = record({1: 9.0}, tmp_path)
    resumed.restore(recorder.records, None)
    for found in (recorder, resumed):
        assert found.best_step == best
        assert found.count_since_best() == since
