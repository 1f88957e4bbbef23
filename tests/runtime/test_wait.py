"""A command at its limit waits for results in progress for a bounded time."""

from typing import Any

import pytest

from rayfuse.runtime import wait
from rayfuse.runtime.progress import StoppedEarly


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(wait.time, "monotonic", lambda: now[0])
    return now


def run_with(monkeypatch: pytest.MonkeyPatch, clock: list[float], ends_at: float) -> None:
    """Let the first of the tasks end at a time; each wait takes its timeout."""

    def fake_wait(tasks: list[Any], *, num_returns: int, timeout: float) -> Any:
        if clock[0] >= ends_at:
            return tasks[:num_returns], tasks[num_returns:]
        clock[0] += timeout
        return [], tasks

    monkeypatch.setattr(wait.ray, "wait", fake_wait)


def test_tasks_that_do_not_end_are_waited_for_half_an_hour_after_the_limit(monkeypatch, clock):
    run_with(monkeypatch, clock, ends_at=1e9)
    tasks = wait.TaskWait(lambda: clock[0] >= 3600)
    with pytest.raises(StoppedEarly):
        tasks.take_ready(["a", "b"])
    assert clock[0] == pytest.approx(3600 + wait.MAX_STOP_SECONDS, abs=2 * wait.POLL_SECONDS)


def test_a_task_that_ends_in_that_time_counts_and_the_stop_comes_where_its_result_is_stored(
    monkeypatch, clock
):
    run_with(monkeypatch, clock, ends_at=4000.0)
    tasks = wait.TaskWait(lambda: clock[0] >= 3600)
    tasks.check_stored()
    assert tasks.take_ready(["a", "b"]) == ("a", ["b"])
    with pytest.raises(StoppedEarly):
        tasks.check_stored()


def test_tasks_that_end_one_after_the_other_do_not_extend_the_time(monkeypatch, clock):
    run_with(monkeypatch, clock, ends_at=0.0)
    tasks = wait.TaskWait(lambda: True)
    assert tasks.take_ready(["a", "b"]) == ("a", ["b"])
    clock[0] += wait.MAX_STOP_SECONDS
    with pytest.raises(StoppedEarly):
        tasks.take_ready(["b"])


def test_without_a_limit_tasks_are_waited_for_as_long_as_they_take(monkeypatch, clock):
    run_with(monkeypatch, clock, ends_at=1e5)
    assert wait.TaskWait(lambda: False).take_ready(["a"]) == ("a", [])
