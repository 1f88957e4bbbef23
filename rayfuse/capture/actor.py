"""The Ray actor that holds one source LLM."""

import os
import signal
import socket
import threading
import time
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray
from ray.util import metrics

from rayfuse.capture.actor_memory import CALLS_PER_ACTOR
from rayfuse.capture.engines.base import LoadEngine
from rayfuse.capture.shard import SHARD_STATS, ShardCapturer
from rayfuse.capture.workers import WorkerState
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import SourceSettings
from rayfuse.runtime.heap import trim_heap
from rayfuse.runtime.logging import log_event
from rayfuse.runtime.ray_internals import list_draining_nodes
from rayfuse.storage.dataset import DataSet

MAX_CRASHES = 5
"""Crashes in a row, before an actor's first shard, that are tolerated: spot nodes are preempted."""

DRAIN_POLL_SECONDS = 5.0
"""Between two checks whether the actor's node is draining."""

HEARTBEAT_SECONDS = 5.0
"""Between two heartbeats to `CaptureControl`."""


class CrashLoopError(RuntimeError):
    """An actor crashes repeatedly before it has finished a shard."""


def describe_crashes(source: SourceSettings, crashes: int) -> str:
    """Describe that the actors of a source crash, with the remedy."""
    return (
        f"source {source.name}: {crashes} times in a row an actor died before it had finished a "
        f"shard with {source.model!r}; give it a node with more memory or lower batch_tokens, "
        "then run the same command again"
    )


class CaptureActor:
    """Holds one source LLM. Ray constructs it once, then calls it per shard, from several threads.

    It is in one of two states: `capturer` is set and captures shards, or `fault` is set and every
    call raises it.
    """

    def __init__(
        self,
        source: SourceSettings,
        settings: CaptureSettings,
        corpus: DataSet,
        captured: DataSet,
        load_engine: LoadEngine,
        control: Any,
    ) -> None:
        self.actor_id, self.control = ray.get_runtime_context().get_actor_id(), control
        self.source = source.name
        self.calls = threading.Semaphore(CALLS_PER_ACTOR)
        self.tags = {"source": source.name}
        self.tokens = metrics.Counter("rayfuse_capture_tokens", "Tokens scored", ("source",))
        self.busy = metrics.Counter(
            "rayfuse_capture_busy_seconds", "The model computed", ("source",)
        )
        self.idle = metrics.Counter("rayfuse_capture_idle_seconds", "The model waited", ("source",))
        self.capturer: ShardCapturer | None = None
        self.fault: Exception | None = None
        # If this raised, Ray would rebuild the actor several times, and the driver would get only a
        # RayActorError in the end. Raised by a call, the error itself reaches the driver at once.
        try:
            self.capturer = self._load_capturer(source, settings, corpus, captured, load_engine)
        except (ValueError, CrashLoopError) as error:
            self.fault = error
            return
        threading.Thread(target=self._exit_when_draining, daemon=True).start()

    def _load_capturer(
        self,
        source: SourceSettings,
        settings: CaptureSettings,
        corpus: DataSet,
        captured: DataSet,
        load_engine: LoadEngine,
    ) -> ShardCapturer:
        """Load the model, unless it has crashed this actor too often.

        Raises:
            CrashLoopError: The actor has crashed more than `MAX_CRASHES` times in a row.
            ValueError: The model cannot be loaded.
        """
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        worker = WorkerState(socket.gethostname(), os.getpid(), [*gpus], time.time())
        start = self.control.record_start.remote(self.actor_id, source.name, worker)
        crashes: int = ray.get(start)  # pyright: ignore[reportAssignmentType]
        # Before the model is loaded, which may take longer than an actor may be silent.
        name = "heartbeats"
        threading.Thread(target=self._send_heartbeats, name=name, daemon=True).start()
        if crashes > MAX_CRASHES:
            raise CrashLoopError(describe_crashes(source, crashes))
        engine = load_engine(source, settings)
        capturer = ShardCapturer(engine, source, corpus, captured)
        trim_heap()
        return capturer

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Capture the shards named in a batch, and return one row of `ShardStats` per shard.

        Once capture is to stop, shards have no row: they are not started.
        """
        if self.capturer is None:
            assert self.fault is not None, "an actor has a capturer or a fault"
            raise self.fault
        with self.calls:
            shards: list[int] = batch["shard"].to_pylist()
            stats = [self._capture(self.capturer, shard) for shard in shards]
            return pa.Table.from_pylist([row for row in stats if row], schema=SHARD_STATS)

    def _capture(self, capturer: ShardCapturer, shard: int) -> dict[str, Any] | None:
        """Capture a shard and return its `ShardStats`; None if capture is to stop."""
        place = (self.actor_id, self.source, shard)
        if not ray.get(self.control.start_shard.remote(*place)):
            return None
        is_done = False
        try:
            stats = capturer.capture(shard)
            is_done = True
        finally:
            # Waited for: `_exit_when_draining` may kill this process once the call has ended.
            ray.get(self.control.end_shard.remote(*place, is_done=is_done))
        if stats.is_ours:
            if stats.tokens:  # Ray refuses to count none
                self.tokens.inc(stats.tokens, self.tags)
            self.busy.inc(stats.busy_seconds, self.tags)
            self.idle.inc(stats.idle_seconds, self.tags)
        return asdict(stats)

    def _send_heartbeats(self) -> None:
        """Report that this process is alive, also while it loads its model or waits to be ended."""
        while self.fault is None:
            self.control.record_heartbeat.remote(self.actor_id)
            time.sleep(HEARTBEAT_SECONDS)

    def _exit_when_draining(self) -> None:
        """End this process once its node is draining and the shards in hand are finished.

        Ray Data gives actors on a draining node no more work, but keeps them there, idle, and
        counts them as its pool. A process that dies is restarted, on another node.
        """
        node = ray.get_runtime_context().get_node_id()
        while not _is_draining(node):
            time.sleep(DRAIN_POLL_SECONDS)
        for _ in range(CALLS_PER_ACTOR):  # with all permits taken, no call is running
            self.calls.acquire()
        # SIGKILL: `ray.actor.exit_actor` counts as intended, and Ray would not restart the actor.
        os.kill(os.getpid(), signal.SIGKILL)


def _is_draining(node: str) -> bool:
    """Check whether a node is draining; False where the cluster does not answer just now."""
    try:
        return node in list_draining_nodes()
    except Exception as error:  # whatever the GCS raises as it restarts: the next check may succeed
        log_event("draining not checked", node=node, error=error)
        return False
