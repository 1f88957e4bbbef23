"""How far stages are."""

import math
import time

from rayfuse.runtime.progress import Pace


def test_what_is_left_is_told_by_what_was_seen_done(monkeypatch):
    pace, clock = Pace(), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    assert pace.estimate_left("a", 50, 100) == math.inf  # done by an earlier job, at any pace
    clock[0] += 30
    assert pace.estimate_left("b", 0, 10) == math.inf
    assert pace.estimate_left("a", 60, 100) == 120
    assert pace.estimate_left("a", 100, 100) == 0
