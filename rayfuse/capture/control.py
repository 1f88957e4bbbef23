"""What all capture actors of a job have in common, in a Ray actor of its own."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from rayfuse.capture.workers import WorkerState

MAX_SILENT_SECONDS = 120.0
"""Without a heartbeat for so long, an actor counts as dead: preempted, or removed from its pool.
A library that keeps the GIL delays heartbeats, so this is many times their interval."""


class CaptureControl:
    """Counts crashes of all actors, knows what they work on, and stops them between shards.

    Ray Data restarts a crashed actor without limit and reports nothing, so that a model that does
    not fit its node would be loaded forever.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Know no actor yet.

        Args:
            clock: Gives the time of heartbeats in seconds; tests replace it.
        """
        self.clock = clock
        self.heartbeats: dict[str, float] = {}
        """When each actor last called, by `clock`. Ray does not report that an actor has gone."""
        self.unproven: set[str] = set()
        """Actors that have started and not yet finished a shard."""
        self.crashes: Counter[str] = Counter()
        self.workers: dict[str, dict[str, WorkerState]] = {}
        """By source and actor."""
        self.is_stopping = False

    def record_start(self, actor_id: str, source: str, worker: WorkerState) -> int:
        """Record that an actor starts, and return its crashes in a row since its last shard.

        Crashes are counted per actor, since the loss of a node takes all its actors at once.

        Args:
            actor_id: The actor's id, which a restart does not change.
            source: The name of its source.
            worker: Its process, which loads the model now.
        """
        self.record_heartbeat(actor_id)
        self.workers.setdefault(source, {})[actor_id] = worker
        if actor_id in self.unproven:
            self.crashes[actor_id] += 1
        self.unproven.add(actor_id)
        return self.crashes[actor_id]

    def record_heartbeat(self, actor_id: str) -> None:
        """Record that an actor is alive."""
        self.heartbeats[actor_id] = self.clock()

    def start_shard(self, actor_id: str, source: str, shard: int) -> bool:
        """Record that an actor starts a shard, and return True, unless capture is to stop."""
        self.record_heartbeat(actor_id)
        if self.is_stopping:
            return False
        worker = self.workers[source][actor_id]
        shards = worker.shards | {str(shard): time.time()}
        self.workers[source][actor_id] = replace(worker, is_loaded=True, shards=shards)
        return True

    def end_shard(self, actor_id: str, source: str, shard: int, *, is_done: bool) -> None:
        """Record that an actor has finished a shard, or failed at it."""
        self.record_heartbeat(actor_id)
        worker = self.workers[source][actor_id]
        shards = {name: began for name, began in worker.shards.items() if name != str(shard)}
        self.workers[source][actor_id] = replace(worker, shards=shards)
        if is_done:
            self.unproven.discard(actor_id)
            self.crashes[actor_id] = 0

    def list_workers(self, source: str) -> list[WorkerState]:
        """List the actors of a source that have been placed on a node and are alive."""
        workers = self.workers.get(source, {})
        return [worker for actor_id, worker in workers.items() if self._is_alive(actor_id)]

    def request_stop(self) -> None:
        """Let no actor start another shard."""
        self.is_stopping = True

    def has_stopped(self) -> bool:
        """Check whether capture is to stop."""
        return self.is_stopping

    def count_running(self) -> int:
        """Count the shards in progress; a dead actor's are lost."""
        return sum(len(w.shards) for source in self.workers for w in self.list_workers(source))

    def _is_alive(self, actor_id: str) -> bool:
        return self.clock() - self.heartbeats[actor_id] < MAX_SILENT_SECONDS
