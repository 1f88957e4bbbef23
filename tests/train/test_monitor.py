"""What the driver reports of the runs that it trains."""

import pytest

from rayfuse.runtime.progress import ProgressEvent
from rayfuse.storage.seal import ShardError
from rayfuse.train.monitor import RunControl, RunMonitor, RunState, RunStatus


@pytest.fixture
def reports() -> list[str]:
    return []


@pytest.fixture
def monitor(reports) -> RunMonitor:
    def report(event: ProgressEvent) -> None:
        reports.append(f"{event.title} {event.done}/{event.total} {event.note}")

    return RunMonitor(report)


def make_states(fused: dict[int, float], clm: dict[int, float]) -> dict[str, RunState]:
    return {"fused": RunState(validations=fused), "clm": RunState(validations=clm)}


def test_fusion_that_is_worse_on_held_out_rows_is_warned_of_once(monitor, reports):
    monitor.report(make_states({}, {}))
    monitor.report(make_states({10: 2.0}, {10: 2.1}))
    monitor.report(make_states({10: 2.0, 20: 2.3}, {10: 2.1}))  # step 20 has no other side yet
    assert not reports
    monitor.report(make_states({10: 2.0, 20: 2.3}, {10: 2.1, 20: 2.2}))
    (warning,) = reports
    assert "at step 20 fusion is worse on held-out rows, 2.3000 bits per byte against" in warning
    monitor.report(make_states({30: 2.3}, {30: 2.2}))
    assert len(reports) == 1


def test_a_run_without_a_baseline_is_not_compared(monitor, reports):
    monitor.report({"fused": RunState(validations={10: 9.0})})
    assert not reports


def test_the_messages_of_a_run_are_reported_once_and_in_order(monitor, reports):
    status = RunStatus()
    status.start("fused")
    status.record_step("fused", 1, 9, "loss 1")
    status.log("fused", "resuming")
    monitor.report(status.read())
    status.log("fused", "corrupt")
    monitor.report(status.read())
    assert reports == [
        "train fused 0/0 resuming",
        "train fused 1/9 loss 1",
        "train fused 0/0 corrupt",
        "train fused 1/9 loss 1",
    ]


def test_a_validation_is_kept_by_its_step():
    status = RunStatus()
    status.record_validation("fused", 10, 1.5)
    assert status.read()["fused"].validations == {10: 1.5}


def test_a_non_retryable_error_is_kept_as_it_was():
    control = RunControl()
    assert control.read_errors() == []
    error = ShardError("shard 3 is missing")
    control.set_error("fused", error)
    assert control.read_errors() == [error]


def test_the_limit_of_a_micro_batch_is_that_of_its_run():
    control = RunControl()
    control.set_max_sequences("fused", 4)
    assert control.read_max_sequences("fused") == 4
    assert control.read_max_sequences("clm") is None


def test_a_run_without_workers_for_a_minute_is_reported_with_its_needs(
    monitor, reports, monkeypatch
):
    monitor.expect({"fused": "2 workers, each 1 CPU", "clm": "2 workers, each 1 CPU"})
    monitor.report({})
    assert not reports
    monkeypatch.setattr("rayfuse.train.monitor.time.monotonic", lambda: float("inf"))
    monitor.report({"clm": RunState()})
    monitor.report({"clm": RunState()})
    assert reports == [
        "train fused 0/0 no worker has started yet; nodes need 2 workers, each 1 CPU"
    ]


def test_a_run_that_another_job_trains_is_reported_once(monitor, reports):
    monitor.report_waiting("fused", "process 7 of there")
    monitor.report_waiting("fused", "process 7 of there")
    (text,) = reports
    assert "process 7 of there trains this run already" in text
