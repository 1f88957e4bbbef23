"""What an actor reports to the control of its job, without Ray."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayfuse.capture import actor as actor_module
from rayfuse.capture.actor import CaptureActor
from rayfuse.capture.engines.base import Engine
from rayfuse.capture.shard import ShardCapturer, ShardStats
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import SourceSettings
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.store import LocalStore

DONE = ShardStats(0, 0, 0, 0, False, "w", 0.0, 0.0, 64, 0)


class LazyControl:
    """A control whose calls arrive only once their results are waited for."""

    def __init__(self) -> None:
        self.arrived: list[str] = []
        self.sent: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def arrive(value: object) -> object:
            self.arrived.append(name)
            return value

        def send(*args: object, **options: object) -> Any:
            self.sent.append(name)
            return lambda: arrive(name != "record_start" or 0)

        return SimpleNamespace(remote=send)


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> LazyControl:
    context = SimpleNamespace(get_accelerator_ids=dict)
    monkeypatch.setattr(actor_module.ray, "get", lambda result: result())
    monkeypatch.setattr(actor_module.ray, "get_runtime_context", lambda: context)
    return LazyControl()


class FakeCapturer(ShardCapturer):
    """Captures nothing, and fails at shard 1."""

    def __init__(self) -> None:
        pass

    def capture(self, shard: int) -> ShardStats:
        if shard == 1:
            raise ValueError("out of memory")
        return DONE


def make_actor(control: LazyControl) -> CaptureActor:
    actor = object.__new__(CaptureActor)
    actor.actor_id, actor.source, actor.control, actor.fault = "a", "mpt", control, None
    return actor


def test_the_end_of_a_shard_has_arrived_before_its_call_ends(control: LazyControl):
    actor = make_actor(control)
    for metric in ("tokens", "busy", "idle"):
        setattr(actor, metric, SimpleNamespace(inc=lambda *_: None))
    assert actor._capture(FakeCapturer(), 0) is not None
    assert control.arrived == ["start_shard", "end_shard"]  # the process may be killed now
    with pytest.raises(ValueError, match="out of memory"):
        actor._capture(FakeCapturer(), 1)
    assert control.arrived == 2 * ["start_shard", "end_shard"]


def test_an_actor_sends_heartbeats_while_it_loads_its_model_until_that_fails(
    control: LazyControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(actor_module, "HEARTBEAT_SECONDS", 0.01)
    actor = make_actor(control)
    data = DataSet(LocalStore(str(tmp_path)), "captured", "mpt", "0123456789ab")
    source = SourceSettings(name="mpt", model="mpt")

    def load(source: SourceSettings, settings: CaptureSettings) -> Engine:
        for _ in range(1000):
            if control.sent.count("record_heartbeat") >= 3:
                break
            threading.Event().wait(0.01)
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        actor._load_capturer(source, CaptureSettings(), data, data, load)
    assert control.sent.count("record_heartbeat") >= 3
    actor.fault = ValueError("no such model")
    for thread in threading.enumerate():
        if thread.name == "heartbeats":
            thread.join(10)
            assert not thread.is_alive()


def test_a_gcs_that_does_not_answer_does_not_end_the_watch_for_draining(
    monkeypatch: pytest.MonkeyPatch,
):
    answers: list[Any] = [RuntimeError("GCS is down"), {}, {"node": 1}]

    def list_draining_nodes() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    killed: list[int] = []
    monkeypatch.setattr(actor_module, "list_draining_nodes", list_draining_nodes)
    monkeypatch.setattr(actor_module, "DRAIN_POLL_SECONDS", 0.0)
    monkeypatch.setattr(actor_module.os, "kill", lambda pid, number: killed.append(pid))
    context = SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setattr(actor_module.ray, "get_runtime_context", lambda: context)
    actor = object.__new__(CaptureActor)
    actor.calls = threading.Semaphore(actor_module.CALLS_PER_ACTOR)
    actor._exit_when_draining()
    assert killed == [os.getpid()]
