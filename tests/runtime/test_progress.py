"""Progress events and the time left that their pace implies."""

import math
import time

from rayfuse.runtime.progress import PaceEstimator, ProgressEvent


def test_the_time_left_follows_from_the_pace_since_the_first_event(monkeypatch):
    pace, clock = PaceEstimator(), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def seconds_left(part: str, done: int, total: int) -> float:
        return pace.estimate_seconds_left(ProgressEvent("corpus", part, done, total))

    assert seconds_left("a", 50, 100) == math.inf  # an earlier job did these, at an unknown pace
    clock[0] += 30
    assert seconds_left("b", 0, 10) == math.inf
    assert seconds_left("a", 60, 100) == 120
    assert seconds_left("a", 100, 100) == 0
