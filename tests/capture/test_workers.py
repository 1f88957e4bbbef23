"""The report of a capture's workers: what each holds and works on, one file a job."""

from pathlib import Path

import pytest

from rayfuse.capture import workers
from rayfuse.capture.control import CaptureControl
from rayfuse.capture.workers import WorkerReporter, WorkerState, drop_reports, read_reports
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.seal import ShardError
from rayfuse.storage.store import LocalStore


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return DataSet(LocalStore(str(tmp_path)), "captured", "mpt", "0123456789ab")


def start_worker(gpu: str) -> WorkerState:
    return WorkerState("node-1", 42, [gpu], 1000.0)


def test_the_registry_knows_which_worker_works_on_which_shard():
    control = CaptureControl()
    assert control.list_workers("mpt") == []
    assert control.record_start("a", "mpt", start_worker("0")) == 0
    assert control.record_start("b", "mpt", start_worker("1")) == 0
    assert not any(worker.is_loaded for worker in control.list_workers("mpt"))
    control.start_shard("a", "mpt", 7)
    control.start_shard("a", "mpt", 8)
    control.end_shard("a", "mpt", 7, is_done=True)
    one, two = control.list_workers("mpt")
    assert ([*one.shards], one.gpus, one.is_loaded) == (["8"], ["0"], True)
    assert ([*two.shards], two.gpus, two.is_loaded) == ([], ["1"], False)
    assert control.record_start("a", "mpt", start_worker("2")) == 0  # restarted after a shard
    assert control.record_start("b", "mpt", start_worker("3")) == 1  # before its first
    assert [worker.gpus for worker in control.list_workers("mpt")] == [["2"], ["3"]]


def test_a_report_is_replaced_until_it_is_stopped(data: DataSet, monkeypatch):
    monkeypatch.setattr(workers, "REPORT_SECONDS", 0.01)
    states: list[WorkerState] = []

    def list_workers() -> list[WorkerState]:
        states.append(start_worker(str(len(states))))
        if len(states) == 3:
            reporter.stop()
        return [states[-1]]

    reporter = WorkerReporter(data, "job", list_workers)
    reporter.run()
    (report,) = read_reports(data)
    assert report.workers == [states[2]]
    drop_reports(data)
    assert read_reports(data) == []


def test_a_corrupt_report_is_an_error(data: DataSet):
    data.store.write(f"{data.folder}/workers/job.json", b'{"time": 1')
    with pytest.raises(ShardError, match=r"job.json is no record"):
        read_reports(data)
