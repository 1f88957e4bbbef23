"""The Ray actor that holds one source LLM, and the registry of all such actors."""

import os
import signal
import socket
import threading
import time
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import ray
from ray.util import metrics

from rayfuse.capture.actor_memory import CALLS_PER_ACTOR
from rayfuse.capture.engines.base import LoadEngine
from rayfuse.capture.shard import ShardCapturer
from rayfuse.capture.workers import WorkerState
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import SourceSettings
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.runtime.heap import trim_heap
from rayfuse.runtime.ray_internals import list_draining_nodes
from rayfuse.storage.dataset import DataSet

MAX_CRASHES = 5
"""Crashes in a row, before an actor's first shard, that are tolerated: spot nodes are preempted."""

DRAIN_POLL_SECONDS = 5.0
"""Between two checks whether the actor's node is draining."""


class CrashLoopError(RuntimeError):
    """An actor crashes repeatedly before it has finished a shard."""


class ActorRegistry:
    """Counts crashes for all actors, and knows what they work on, in an actor of its own.

    Ray Data restarts a crashed actor without limit and reports nothing, so that a model that does
    not fit its node would be loaded forever.
    """

    def __init__(self) -> None:
        self.unproven: set[str] = set()
        """Actors that have started and not yet finished a shard."""
        self.crashes: Counter[str] = Counter()
        self.workers: dict[str, dict[str, WorkerState]] = {}
        """By source and actor."""

    def record_start(self, actor_id: str, source: str, worker: WorkerState) -> int:
        """Record that an actor starts, and return its crashes in a row since its last shard.

        Crashes are counted per actor, since the loss of a node takes all its actors at once.

        Args:
            actor_id: The actor's id, which a restart does not change.
            source: The name of its source.
            worker: Its process, which loads the model now.
        """
        self.workers.setdefault(source, {})[actor_id] = worker
        if actor_id in self.unproven:
            self.crashes[actor_id] += 1
        self.unproven.add(actor_id)
        return self.crashes[actor_id]

    def record_taken(self, actor_id: str, source: str, shard: int) -> None:
        """Record that an actor begins with a shard."""
        worker = self.workers[source][actor_id]
        shards = worker.shards | {str(shard): time.time()}
        self.workers[source][actor_id] = replace(worker, is_loaded=True, shards=shards)

    def record_shard(self, actor_id: str, source: str, shard: int) -> None:
        """Record that an actor has finished a shard."""
        self.unproven.discard(actor_id)
        self.crashes[actor_id] = 0
        worker = self.workers[source][actor_id]
        shards = {name: began for name, began in worker.shards.items() if name != str(shard)}
        self.workers[source][actor_id] = replace(worker, shards=shards)

    def list_workers(self, source: str) -> list[WorkerState]:
        """List the actors of a source that have been placed on a node."""
        return [*self.workers.get(source, {}).values()]


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
        registry: Any,
    ) -> None:
        self.actor_id, self.registry = ray.get_runtime_context().get_actor_id(), registry
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
        start = self.registry.record_start.remote(self.actor_id, source.name, worker)
        crashes: int = ray.get(start)  # pyright: ignore[reportAssignmentType]
        if crashes > MAX_CRASHES:
            raise CrashLoopError(describe_crashes(source, crashes))
        engine = load_engine(source, settings)
        capturer = ShardCapturer(engine, load_recipe_tokenizer(source), corpus, captured)
        trim_heap()
        return capturer

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Capture the shards named in a batch, and return one row of `ShardStats` per shard."""
        if self.capturer is None:
            assert self.fault is not None, "an actor has a capturer or a fault"
            raise self.fault
        with self.calls:
            shards: list[int] = batch["shard"].to_pylist()
            return pa.Table.from_pylist([self._capture(self.capturer, shard) for shard in shards])

    def _capture(self, capturer: ShardCapturer, shard: int) -> dict[str, Any]:
        self.registry.record_taken.remote(self.actor_id, self.source, shard)
        stats = capturer.capture(shard)
        self.registry.record_shard.remote(self.actor_id, self.source, shard)
        if stats.is_ours:
            if stats.tokens:  # Ray refuses to count none
                self.tokens.inc(stats.tokens, self.tags)
            self.busy.inc(stats.busy_seconds, self.tags)
            self.idle.inc(stats.idle_seconds, self.tags)
        return asdict(stats)

    def _exit_when_draining(self) -> None:
        """End this process once its node is draining and the shards in hand are finished.

        Ray Data gives actors on a draining node no more work, but keeps them there, idle, and
        counts them as its pool. A process that dies is restarted, on another node.
        """
        node = ray.get_runtime_context().get_node_id()
        while node not in list_draining_nodes():
            time.sleep(DRAIN_POLL_SECONDS)
        for _ in range(CALLS_PER_ACTOR):  # with all permits taken, no call is running
            self.calls.acquire()
        # SIGKILL: `ray.actor.exit_actor` counts as intended, and Ray would not restart the actor.
        os.kill(os.getpid(), signal.SIGKILL)
