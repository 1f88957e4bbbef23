"""The capture stage: for each source a Ray Data stream of shards through actors with its LLM.

Blocks carry shard numbers, never the data: an actor reads a corpus shard, scores it and commits
the captured shard; a CPU task right behind it aligns it.
"""

import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayActorError

from rayfuse.capture.actor import (
    MAX_CRASHES,
    ActorRegistry,
    CaptureActor,
    describe_crashes,
)
from rayfuse.capture.actor_memory import CALLS_PER_ACTOR
from rayfuse.capture.engines.base import LoadEngine
from rayfuse.capture.engines.load import load_recipe_engine
from rayfuse.capture.scheduling import NEXT_STEP_CPUS, NextStep, PlanStep, SourceWork, plan_work
from rayfuse.capture.shard import ShardStats
from rayfuse.capture.stats import MetricsLog, StatsAccumulator, to_line
from rayfuse.capture.workers import WorkerReporter, WorkerState, drop_reports
from rayfuse.config.base import UserError, first_line
from rayfuse.config.recipe import Recipe
from rayfuse.run.layout import Layout
from rayfuse.run.segmentation import write_segmentation
from rayfuse.runtime.connect import find_root_cause
from rayfuse.runtime.progress import Progress, ProgressEvent
from rayfuse.runtime.resources import (
    REPORT_WAIT_SECONDS,
    describe_needs,
    gpu_options,
    memory_options,
    on_driver_node,
)
from rayfuse.storage.todo import split_shards

NO_PROGRESS_SECONDS = 86_400
"""A day: the autoscaler may wait long for nodes with the right GPU."""


def capture_sources(
    recipe: Recipe,
    layout: Layout,
    progress: Progress,
    load_engine: LoadEngine = load_recipe_engine,
    *,
    then: PlanStep,
) -> None:
    """Capture what is missing of every source, all sources at once, and align it behind.

    Args:
        recipe: The run's recipe.
        layout: Its data sets.
        progress: Receives the shards done of each source, and notes.
        load_engine: Loads a source's model in an actor; tests replace it.
        then: Plans what happens to each captured shard; in a run, `align.task.plan_align_step`.

    Raises:
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
    work = plan_work(recipe, layout, progress, then)
    registry: Any = ray.remote(**on_driver_node())(ActorRegistry).remote()
    job = uuid.uuid4().hex[:12]
    ended: SimpleQueue[BaseException | None] = SimpleQueue()
    for item in work:
        capture = SourceCapture(item, progress, load_engine, registry, job)
        # Daemons: on SIGINT or SIGTERM the main thread must not wait for the sources to end.
        threading.Thread(target=capture.run, args=(ended,), daemon=True).start()
    errors = [error for error in (ended.get() for _ in work) if error is not None]
    if errors:
        raise errors[0]


@dataclass(frozen=True)
class SourceCapture:
    """The capture of one source, in a thread of its own."""

    work: SourceWork
    progress: Progress
    load_engine: LoadEngine
    registry: Any
    """The handle of the `ActorRegistry` actor."""
    job: str
    """An id of this call of `capture_sources`."""

    def run(self, ended: SimpleQueue[BaseException | None]) -> None:
        """Capture and align the source's shards, and put the error, or None, into a queue."""
        timer = threading.Timer(REPORT_WAIT_SECONDS, self._report_wait)
        timer.daemon = True
        timer.start()
        outcome: BaseException | None = None
        try:
            self._capture()
        except BaseException as error:  # the main thread raises it
            outcome = error
            self._note(f"stopped: {first_line(find_root_cause(error))}")
        finally:
            timer.cancel()
            ended.put(outcome)  # whatever failed above: the main thread waits for it

    def _note(self, text: str) -> None:
        self.progress(ProgressEvent("capture", self.work.source.name, note=text))

    def _list_workers(self) -> list[WorkerState]:
        return ray.get(self.registry.list_workers.remote(self.work.source.name))

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
        # Shards captured by an earlier job may not be aligned yet; the align stage does those.
        if len(work.aligned.list_committed(work.num_shards)) == work.num_shards:
            work.aligned.finish(work.num_shards)

    def _capture_shards(self) -> None:
        work = self.work
        drop_reports(work.captured)
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
                self.progress(ProgressEvent("capture", work.source.name, *done, "shards", note))
                log.write(to_line(stats), is_last=stats.shards_done == stats.num_shards)
                total.check_rejects(work.settings.max_rejected_share)
        finally:
            reporter.stop()
        thread.join()
        drop_reports(work.captured)

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
                    self.registry,
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
