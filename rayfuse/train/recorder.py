"""The metrics of a run, from each step to metrics.jsonl, the driver and the trackers."""

import json
import os
import socket
import time
from dataclasses import replace
from typing import Any

from rayfuse.run.layout import TrainRun
from rayfuse.runtime.metrics import count_work
from rayfuse.storage.store import Store
from rayfuse.train.checkpoint import rank_bits
from rayfuse.train.live import LiveUploads, TrainWorker, write_workers
from rayfuse.train.loop import StepMetrics
from rayfuse.train.process_group import ProcessGroup
from rayfuse.train.trackers import Trackers

MIN_REPORTED_WAIT = 0.1
"""The share of a step that goes to waiting for data from which it is reported."""


class MetricsRecorder:
    """Keeps the metrics of every step on each worker; rank 0 publishes them."""

    def __init__(
        self, run: TrainRun, store: Store, status: Any, trackers: Trackers, group: ProcessGroup
    ) -> None:
        """Start without any step.

        Args:
            run: The run.
            store: Where metrics.jsonl goes.
            status: The `RunStatus` actor.
            trackers: Already opened when the first step is recorded.
            group: This worker and the others.
        """
        self.run, self.store, self.status = run, store, status
        self.trackers, self.group = trackers, group
        self.live = LiveUploads(store, f"{run.folder}/metrics.jsonl")
        self.records: list[dict[str, Any]] = []
        self.bits_per_byte: float | None = None
        self.validations: dict[int, float] = {}
        """Held-out bits per byte by step; apart from the records, since each step asks for them."""
        self.counted_at = time.monotonic()
        """Monotonic time up to which worker time is reported, in seconds."""

    @property
    def num_skipped(self) -> int:
        """Consecutive steps, up to the last one, that were skipped."""
        taken = [number for number, record in enumerate(self.records, 1) if _is_taken(record)]
        return len(self.records) - max(taken, default=0)

    @property
    def best_step(self) -> int | None:
        """The step of the validation with the lowest bits per byte; None before the first."""
        measured = self.validations
        return min(measured, key=lambda step: (*rank_bits(measured[step]), step), default=None)

    def count_since_best(self) -> int:
        """Count the validations after the best one."""
        best = self.best_step
        return 0 if best is None else sum(step > best for step in self.validations)

    def restore(self, records: list[dict[str, Any]], bits_per_byte: float | None) -> None:
        """Take over the metrics of a checkpoint.

        Args:
            records: Those of each step up to it.
            bits_per_byte: The last validation before it.
        """
        self.records, self.bits_per_byte = records, bits_per_byte
        steps = enumerate(records, 1)
        self.validations = {
            step: record["bits_per_byte"] for step, record in steps if "bits_per_byte" in record
        }

    def publish_workers(self, gpus: list[str]) -> None:
        """Store which workers train the run; all must call.

        Args:
            gpus: The ids of this worker's GPUs.
        """
        own = TrainWorker(self.group.rank, socket.gethostname(), os.getpid(), [*gpus])
        workers = self.group.gather(own)
        if self.group.is_rank_zero:
            write_workers(self.store, self.run.folder, workers)

    def record_step(self, metrics: StepMetrics, num_steps: int) -> None:
        """Add a step's metrics, and report them.

        Args:
            metrics: Those of all workers.
            num_steps: Steps of the entire run.
        """
        tokens_before = self.records[-1]["tokens"] if self.records else 0
        metrics_so_far = replace(metrics, tokens=tokens_before + metrics.tokens)
        self.records.append(metrics_so_far.to_record())
        if not self.group.is_rank_zero:
            return
        if metrics.is_skipped:
            self.log(
                f"step {metrics.step} was skipped: its loss or gradient is not finite (rows "
                f"{metrics.batch_id}); the weights are unchanged"
            )
        note = self._describe_step(metrics)
        self.status.record_step.remote(
            self.run.name, metrics.step, num_steps, note, self._count_worker_seconds()
        )
        self.trackers.log(self.records[-1])
        count_work("train", self.run.name, tokens=metrics.tokens, seconds=metrics.seconds)
        self.live.offer(lambda: self.to_lines().encode())

    def _count_worker_seconds(self) -> float:
        """Count the time of all workers since the last call, loading of the model included."""
        before, self.counted_at = self.counted_at, time.monotonic()
        return (self.counted_at - before) * self.group.num_workers

    def record_validation(self, step: int, bits_per_byte: float) -> None:
        """Add the held-out bits per byte to the last step, and report them."""
        self.bits_per_byte = self.validations[step] = bits_per_byte
        self.records[-1]["bits_per_byte"] = bits_per_byte
        if self.group.is_rank_zero:
            self.status.record_validation.remote(self.run.name, step, bits_per_byte)
            self.trackers.log({"step": step, "bits_per_byte": bits_per_byte})

    def log(self, message: str) -> None:
        """Show a message to the user, once for all workers."""
        if self.group.is_rank_zero:
            self.status.log.remote(self.run.name, message)

    def upload(self) -> bytes:
        """Write metrics.jsonl and the trackers' files to the store, and return the former."""
        content = self.to_lines().encode()
        self.live.wait()  # or it would replace this newer content
        self.store.write(f"{self.run.folder}/metrics.jsonl", content)
        self.trackers.upload(self.store)
        return content

    def to_lines(self) -> str:
        """Return the content of metrics.jsonl: one line a step."""
        return "".join(json.dumps(record) + "\n" for record in self.records)

    def _describe_step(self, metrics: StepMetrics) -> str:
        loss = "not finite" if metrics.loss is None else f"{metrics.loss:.3f}"
        note = f"loss {loss}, {metrics.tokens_per_second:,.0f} tokens/s"
        if self.group.num_workers > 1:
            note += f" on {self.group.num_workers} workers"
        if metrics.wait_seconds > MIN_REPORTED_WAIT * metrics.seconds:
            note += f", {metrics.wait_seconds / metrics.seconds:.0%} waiting for data"
        if self.bits_per_byte is not None:
            note += f", held-out {self.bits_per_byte:.4f} bits per byte"
        return note


def _is_taken(record: dict[str, Any]) -> bool:
    return not record["is_skipped"]
