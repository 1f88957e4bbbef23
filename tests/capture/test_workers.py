"""The report of a capture's workers: what each holds and works on, one file a job."""

import time
from pathlib import Path

import pytest
from botocore.exceptions import NoCredentialsError

from rayfuse.capture import workers
from rayfuse.capture.control import MAX_SILENT_SECONDS, CaptureControl
from rayfuse.capture.workers import (
    MAX_REPORT_SECONDS,
    WorkerReport,
    WorkerReporter,
    WorkerState,
    drop_old_reports,
    read_reports,
)
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.seal import ShardError, seal
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


def test_the_shards_of_an_actor_that_falls_silent_are_not_in_progress():
    now = [0.0]
    control = CaptureControl(clock=lambda: now[0])
    for actor_id, gpu in (("lost", "0"), ("slow", "1"), ("idle", "2")):
        control.record_start(actor_id, "mpt", start_worker(gpu))
    control.start_shard("lost", "mpt", 7)
    control.start_shard("slow", "mpt", 8)
    for now[0] in (60.0, 119.0, 150.0):  # a shard may take longer than an actor may be silent
        control.record_heartbeat("slow")
        assert control.count_running() == (2 if now[0] < MAX_SILENT_SECONDS else 1)
    (slow,) = control.list_workers("mpt")  # nor does a pool that shrank keep its GPU
    assert (slow.gpus, [*slow.shards]) == (["1"], ["8"])
    control.end_shard("slow", "mpt", 8, is_done=True)
    assert control.count_running() == 0


def test_an_actor_that_was_silent_and_returns_is_alive():
    now = [0.0]
    control = CaptureControl(clock=lambda: now[0])
    control.record_start("a", "mpt", start_worker("0"))
    control.start_shard("a", "mpt", 7)
    now[0] = 1000.0
    assert control.list_workers("mpt") == []
    control.record_heartbeat("a")  # its network was gone
    assert control.count_running() == 1
    now[0] = 2000.0
    assert control.record_start("a", "mpt", start_worker("1")) == 1  # on another node
    assert [worker.gpus for worker in control.list_workers("mpt")] == [["1"]]
    assert control.count_running() == 0


def test_a_report_is_replaced_until_it_is_stopped(data: DataSet, monkeypatch):
    monkeypatch.setattr(workers, "REPORT_SECONDS", 0.01)
    states: list[WorkerState] = []
    seen: list[WorkerReport] = []

    def list_workers() -> list[WorkerState]:
        states.append(start_worker(str(len(states))))
        seen.extend(read_reports(data))
        if len(states) == 3:
            reporter.stop()
        return [states[-1]]

    reporter = WorkerReporter(data, "job", list_workers)
    reporter.run()
    assert [report.workers for report in seen] == [[states[0]], [states[1]]]
    assert read_reports(data) == []  # removed at the end


def test_a_job_removes_old_and_corrupt_reports_but_none_of_a_job_beside_it(data: DataSet):
    ages = {"beside": 20.0, "slow-clock": -600.0, "killed": MAX_REPORT_SECONDS + 1}
    for job, age in ages.items():
        record = {"time": time.time() - age, "workers": []}
        data.store.write(f"{data.folder}/workers/{job}.json", seal(record))
    data.store.write(f"{data.folder}/workers/corrupt.json", b'{"time": 1')
    drop_old_reports(data)
    assert sorted(data.store.sizes(f"{data.folder}/workers")) == ["beside.json", "slow-clock.json"]


class FailingStore(LocalStore):
    """A store whose first writes fail in the client, with errors that are no OSError."""

    failures = 2

    def write(self, name: str, data: bytes) -> None:
        self.failures -= 1
        if self.failures >= 0:
            raise NoCredentialsError
        super().write(name, data)


def test_reports_go_on_after_errors_of_ray_and_of_the_storages_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(workers, "REPORT_SECONDS", 0.01)
    data = DataSet(FailingStore(str(tmp_path)), "captured", "mpt", "0123456789ab")
    calls: list[int] = []
    seen: list[WorkerReport] = []

    def list_workers() -> list[WorkerState]:
        calls.append(len(calls))
        if len(calls) == 1:
            raise RuntimeError("the control's node is gone")
        if len(calls) == 5:
            seen.extend(read_reports(data))
            reporter.stop()
        return [start_worker("0")]

    reporter = WorkerReporter(data, "job", list_workers)
    reporter.run()
    assert [report.workers for report in seen] == [[start_worker("0")]]


def test_a_corrupt_report_is_an_error(data: DataSet):
    data.store.write(f"{data.folder}/workers/job.json", b'{"time": 1')
    with pytest.raises(ShardError, match=r"job.json is no record"):
        read_reports(data)
