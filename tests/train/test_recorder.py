"""The best validation: the lowest, the earliest of equals, never one that is not finite."""

import math
from typing import Any

import pytest

from rayfuse.train.recorder import MetricsRecorder


class _NotRankZero:
    is_rank_zero = False


def record(validations: dict[int, float]) -> MetricsRecorder:
    nothing: Any = None
    group: Any = _NotRankZero()
    recorder = MetricsRecorder(nothing, nothing, nothing, nothing, group)
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
def test_the_best_step_is_the_same_after_a_resume(validations, best, since):
    recorder = record(validations)
    resumed = record({1: 9.0})
    resumed.restore(recorder.records, None)
    for found in (recorder, resumed):
        assert found.best_step == best
        assert found.count_since_best() == since
