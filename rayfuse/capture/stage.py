"""The capture stage: for each source a Ray Data stream of shards through actors with its LLM.

Blocks carry shard numbers, never the data: an actor reads a corpus shard, scores it and commits
the captured shard; a CPU task right behind it aligns it.
"""

import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayActorError, RaySystemError

from rayfuse.capture.actor import (
    MAX_CRASHES,
    CaptureActor,
    describe_crashes,
)
from rayfuse.capture.actor_memory import CALLS_PER_ACTOR
from rayfuse.capture.control import CaptureControl
from rayfuse.capture.engines.base import LoadEngine
from rayfuse.capture.engines.load import load_recipe_engine
from rayfuse.capture.scheduling import NEXT_STEP_CPUS, NextStep, PlanStep, SourceWork, plan_work
from rayfuse.capture.shard import ShardStats
from rayfuse.capture.stats import MetricsLog, StatsAccumulator, to_line
from rayfuse.capture.workers import WorkerReporter, WorkerState, drop_old_reports
from rayfuse.config.base import UserError, first_line
from rayfuse.config.models import SourceSettings
from rayfuse.config.recipe import Recipe
from rayfuse.run.failed_sources import forget_failure, list_fused, record_failure
from rayfuse.run.layout import Layout
from rayfuse.run.segmentation import write_segmentation
from rayfuse.runtime.connect import find_root_cause
from rayfuse.runtime.progress import (
    Progress,
    ProgressEvent,
    ShouldStop,
    StoppedEarly,
    never_stop,
)
from rayfuse.runtime.resources import (
    REPORT_WAIT_SECONDS,
    describe_needs,
    gpu_options,
    memory_options,
    on_driver_node,
)
from rayfuse.storage.retry import AccessSettingsError, StorageUnavailableError
from rayfuse.storage.seal import ShardError
from rayfuse.storage.todo import split_shards

Outcome = tuple[SourceSettings | None, BaseException | None]
"""A source, or None for all, with the error that has ended its capture, or None."""

SHARED_FAULTS = (
    *(StorageUnavailableError, AccessSettingsError, ShardError),
    *(OSError, RaySystemError),
)
"""Errors that every source may get: of the storage, of a disk and of the cluster's connection."""

POLL_SECONDS = 1.0
"""Between two checks whether capture is to stop."""

MAX_STOP_SECONDS = 1800.0
"""How long shards in progress are waited for when capture stops; what takes longer is lost."""

ALIGN_SECONDS = 30.0
"""Time for the last captured shards to be aligned; the align stage does the others."""

NO_PROGRESS_SECONDS = 86_400
"""A day: the autoscaler may wait long for nodes with the right GPU."""


def capture_sources(
    recipe: Recipe,
    layout: Layout,
    progress: Progress,
    load_engine: LoadEngine = load_recipe_engine,
    *,
    then: PlanStep,
    should_stop: ShouldStop = never_stop,
) -> None:
    """Capture what is missing of every source, all sources at once, and align it behind.

    The failure of a source with `required: false` is recorded, and no error.

    Args:
        recipe: The run's recipe.
        layout: Its data sets.
        progress: Receives the shards done of each source, and notes.
        load_engine: Loads a source's model in an actor; tests replace it.
        then: Plans what happens to each captured shard; in a run, `align.task.plan_align_step`.
        should_stop: Once it returns True, no further shard is started.

    Raises:
        StoppedEarly: It has stopped between shards, as it was to.
        UserError: The corpus is incomplete, a model cannot be used, or too many rows are rejected.
        StorageUnavailableError: The storage has been unavailable for too long.
        RuntimeError: Actors crash repeatedly before they have finished a shard.
    """
    if not layout.corpus.is_complete():
        raise UserError("the corpus is incomplete; run `rayfuse corpus` first")
    for rows in (layout.corpus_documents.segmentation, layout.held_out_documents.segmentation):
        write_segmentation(layout.store, rows)
    # For the entire process: Ray's context manager swaps a global, and each source has a thread.
    context = DataContext.get_current()
    context.max_consecutive_actor_init_deaths = MAX_CRASHES
    context.execution_no_progress_timeout_s = NO_PROGRESS_SECONDS
    work, refused = plan_work(recipe, layout, progress, then)
    control: Any = ray.remote(**on_driver_node())(CaptureControl).remote()
    job = uuid.uuid4().hex[:12]
    ended: SimpleQueue[Outcome] = SimpleQueue()
    for item in work:
        capture = SourceCapture(item, progress, load_engine, control, job)
        # Daemons: on SIGINT or SIGTERM the main thread must not wait for the sources to end.
        name = f"capture {item.source.name}"
        threading.Thread(target=capture.run, args=(ended,), name=name, daemon=True).start()
    try:
        outcomes = _wait_for_sources(len(work), ended, control, should_stop)
    except BaseException:  # an interrupt; in a notebook the process lives on, and the threads
        control.request_stop.remote()
        raise
    _handle_errors(recipe, layout, [*refused, *outcomes])


def _wait_for_sources(
    num_sources: int,
    ended: SimpleQueue[Outcome],
    control: Any,
    should_stop: ShouldStop,
) -> list[Outcome]:
    """Wait until all sources have ended, and return the error, or None, of each.

    Sources that still wait for a node when capture is to stop are not waited for.
    """
    outcomes: list[Outcome] = []
    stop = CaptureStop(control, should_stop)
    while len(outcomes) < num_sources:
        try:
            outcomes.append(ended.get(timeout=POLL_SECONDS))
        except Empty:
            if stop.is_over():
                return [*outcomes, (None, StoppedEarly())]
    return outcomes


def _handle_errors(recipe: Recipe, layout: Layout, outcomes: list[Outcome]) -> None:
    """Raise the gravest error, or record the failures that the run continues after.

    If every source that fusion learns from has failed, the first error is raised.
    """
    errors: list[BaseException] = []
    failed: list[tuple[SourceSettings, BaseException]] = []
    for source, error in outcomes:
        if error is not None and source is not None and _may_fail(source, error):
            failed.append((source, error))
        elif error is not None:
            errors.append(error)
    if list_fused(recipe) <= {source.name for source, _ in failed}:
        errors = [error for _, error in failed]
    for error in sorted(errors, key=lambda error: isinstance(error, StoppedEarly)):
        raise error
    for source, error in failed:
        record_failure(recipe, layout, source.name, first_line(find_root_cause(error)))


def _may_fail(source: SourceSettings, error: BaseException) -> bool:
    """Check whether the run can continue after this error of a source.

    Faults of the storage, of what is stored and of the cluster's connection are not the source's.
    """
    if source.required or not isinstance(error, Exception) or isinstance(error, StoppedEarly):
        return False
    return not isinstance(find_root_cause(error), SHARED_FAULTS)


class CaptureStop:
    """Stops the actors once that is wanted, and detects that no shard is in progress any more."""

    def __init__(self, control: Any, should_stop: ShouldStop) -> None:
        """Request nothing yet.

        Args:
            control: The handle of the `CaptureControl` actor.
            should_stop: Whether capture is to stop.
        """
        self.control, self.should_stop = control, should_stop
        self.deadline: float | None = None
        """Monotonic time until which shards in progress are waited for."""

    def is_over(self) -> bool:
        """Check whether capture is to stop, and its shards are committed or take too long."""
        now = time.monotonic()
        if self.deadline is None:
            if self.should_stop():
                ray.get(self.control.request_stop.remote())
                self.deadline = now + MAX_STOP_SECONDS
        elif now < self.deadline and ray.get(self.control.count_running.remote()) == 0:
            self.deadline = min(self.deadline, now + ALIGN_SECONDS)
        return self.deadline is not None and now >= self.deadline


@dataclass(frozen=True)
class SourceCapture:
    """The capture of one source, in a thread of its own."""

    work: SourceWork
    progress: Progress
    load_engine: LoadEngine
    control: Any
    """The handle of the `CaptureControl` actor."""
    job: str
    """An id of this call of `capture_sources`."""

    def run(self, ended: SimpleQueue[Outcome]) -> None:
        """Capture and align the source's shards, and put the outcome into a queue."""
        timer = threading.Timer(REPORT_WAIT_SECONDS, self._report_wait)
        timer.daemon = True
        timer.start()
        outcome: BaseException | None = None
        try:
            self._capture()
        except BaseException as error:  # the main thread raises it
            outcome = error
            if not isinstance(error, StoppedEarly):
                rest = "" if self.work.source.required else "; it is not required"
                self._note(f"stopped: {first_line(find_root_cause(error))}{rest}")
        finally:
            timer.cancel()
            ended.put(
                (self.work.source, outcome)
            )  # whatever failed above: the main thread waits for it

    def _note(self, text: str) -> None:
        self.progress(ProgressEvent("capture", self.work.source.name, note=text))

    def _list_workers(self) -> list[WorkerState]:
        return ray.get(self.control.list_workers.remote(self.work.source.name))

    def _report_wait(self) -> None:
        """Report what the source waits for, if it has done no shard yet: a node, or its model."""
        source, workers = self.work.source, self._list_workers()
        if not workers:
            resources = {"CPU": source.cpus, "GPU": self.work.gpus}
            resources["memory"] = self.work.memory_bytes
            needs = describe_needs(resources, source.accelerator_type)
            self._note(f"no actor has started yet; one needs a node with {needs} free")
        elif not any(worker.is_loaded for worker in workers):
            number = "an actor loads" if len(workers) == 1 else f"{len(workers)} actors load"
            self._note(f"{number} the model {source.model}")

    def _capture(self) -> None:
        work = self.work
        if work.shards:
            self._capture_shards()
        work.captured.finish(work.num_shards)
        forget_failure(work.captured)
        # Shards captured by an earlier job may not be aligned yet; the align stage does those.
        if len(work.aligned.list_committed(work.num_shards)) == work.num_shards:
            work.aligned.finish(work.num_shards)

    def _capture_shards(self) -> None:
        work = self.work
        drop_old_reports(work.captured)
        reporter = WorkerReporter(work.captured, self.job, self._list_workers)
        thread = threading.Thread(target=reporter.run, daemon=True)
        thread.start()
        try:
            total = StatsAccumulator(
                source=work.source.name,
                num_shards=work.num_shards,
                done_before=work.num_shards - len(work.shards),
                batch_tokens=work.settings.batch_tokens,
                dollars_per_hour=work.source.dollars_per_hour,
                rows=work.rows_before,
                rejects=work.rejects_before,
            )
            log = MetricsLog(work.captured)
            for shard_stats in self._stream_stats():
                total.add(shard_stats)
                stats = total.compute_stats()
                note = stats.describe(work.settings.batch_tokens)
                done = stats.shards_done, stats.num_shards
                self.progress(
                    ProgressEvent(
                        "capture", work.source.name, *done, "shards", note, total.worker_seconds
                    )
                )
                log.write(to_line(stats), is_last=stats.shards_done == stats.num_shards)
                total.check_rejects(work.settings.max_rejected_share)
            if total.shards < len(work.shards) and ray.get(self.control.has_stopped.remote()):
                raise StoppedEarly
        finally:
            reporter.stop()
        thread.join()

    def _stream_stats(self) -> Iterator[ShardStats]:
        """Capture and align the source's shards, and yield the counts and times of each.

        Raises:
            RuntimeError: Actors crash repeatedly before they have finished a shard.
        """
        try:
            for row in self._build_stream().iter_rows():
                yield ShardStats(**row)
        except RayActorError as error:
            raise RuntimeError(describe_crashes(self.work.source, MAX_CRASHES + 1)) from error

    def _build_stream(self) -> ray.data.Dataset:
        work, source = self.work, self.work.source
        return (
            ray.data.from_arrow(split_shards(work.shards))
            .map_batches(
                CaptureActor,
                fn_constructor_args=(
                    source,
                    work.settings,
                    work.corpus,
                    work.captured,
                    self.load_engine,
                    self.control,
                ),
                batch_size=1,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(
                    min_size=min(source.min_actors, work.max_actors),
                    max_size=work.max_actors,
                    # Ray adds actors once the present ones have 1.75 times the calls they can run,
                    # so there must be room for more tasks in flight than that.
                    max_tasks_in_flight_per_actor=2 * CALLS_PER_ACTOR,
                    max_concurrent_calls_per_actor=CALLS_PER_ACTOR,
                    enable_true_multi_threading=True,
                ),
                num_cpus=source.cpus,
                **gpu_options(work.gpus, source.accelerator_type),
                **memory_options(work.memory_bytes),
            )
            .map_batches(
                partial(_run_next_step, next_step=work.next_step),
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=NEXT_STEP_CPUS,
            )
        )


def _run_next_step(batch: pa.Table, next_step: NextStep) -> pa.Table:
    """Run the next step on freshly captured shards."""
    for shard in batch["shard"].to_pylist():
        next_step(shard)
    return batch
