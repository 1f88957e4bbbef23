"""The train stage: Ray Train workers around a DeepSpeed engine, with and without fusion at once."""

import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
import ray.train
from pyarrow.fs import LocalFileSystem
from ray.exceptions import RayTaskError
from ray.train.torch import TorchConfig, TorchTrainer

from rayfuse.config.base import UserError
from rayfuse.config.recipe import Recipe
from rayfuse.fuse.source_filter import select_active_sources
from rayfuse.run.layout import Layout, TrainRun
from rayfuse.run.made_models import DONE_FILE, is_current, is_made, read_done, read_inputs
from rayfuse.runtime.progress import (
    Progress,
    ProgressEvent,
    ShouldStop,
    StoppedEarly,
    never_stop,
)
from rayfuse.runtime.resources import (
    count_default_gpus,
    count_reachable,
    describe_needs,
    on_driver_node,
)
from rayfuse.runtime.scratch import scratch_folder
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.lease import Lease
from rayfuse.storage.store import Store
from rayfuse.train.checkpoint import Checkpoints
from rayfuse.train.monitor import RunControl, RunMonitor, RunStatus
from rayfuse.train.task import WorkerTask
from rayfuse.train.trackers import check_trackers
from rayfuse.train.worker import run_worker

POLL_SECONDS = 0.5

MAX_STOP_SECONDS = 1800.0
"""How long checkpoints are waited for when training stops; then the one before is the last."""

NOISE = (
    "skipped: it predicts no row better than chance; check that its weights and tokenizer "
    "belong together, or set fuse.skip_noise: false"
)

WORKER_START_SECONDS = "3600"
"""Ray Train's timeout until all workers have started. Its default of a minute is shorter than an
autoscaler needs for a node."""

RESIZE_SECONDS = 30.0
"""Between two checks whether an elastic run can have more workers."""


def check_data(*data_sets: DataSet) -> None:
    """Check that every data set is complete and holds rows.

    Raises:
        UserError: One does not.
    """
    for data in data_sets:
        if not data.is_complete():
            raise UserError(
                f"{data.folder} is incomplete; run `rayfuse corpus`, `capture` and `align` first"
            )
        manifest = data.read_manifest()
        if manifest is None or not manifest.rows:
            raise UserError(
                f"{data.folder} has no rows to train on; `rayfuse status` shows why documents were "
                "rejected"
            )


def train_runs(
    recipe: Recipe, layout: Layout, progress: Progress, should_stop: ShouldStop = never_stop
) -> None:
    """Train every run that is not trained yet, in parallel if the cluster has room.

    Args:
        recipe: The run's recipe.
        layout: Its folders.
        progress: Receives the steps of each run, and notes.
        should_stop: Once it returns True, all runs stop at a checkpoint after their current step.

    Raises:
        StoppedEarly: They have stopped, as they were to.
        UserError: A data set is incomplete or has no rows, every source is noise, a tracker is not
            installed, or one sequence does not fit the memory.
        ShardError: A shard is missing or corrupt.
        FloatingPointError: Losses or gradients of several consecutive steps are not finite.
        StorageUnavailableError: The storage has failed for longer than the retries last.
    """
    train_together([(recipe, layout)], progress, should_stop)


def train_together(
    plans: Sequence[tuple[Recipe, Layout]], progress: Progress, should_stop: ShouldStop = never_stop
) -> None:
    """Train the runs of several recipes that share a target, a storage and settings of training.

    Args:
        plans: The recipes with their folders. All runs have different names.
        progress: As for `train_runs`, and so is `should_stop`.

    Raises:
        As for `train_runs`.
    """
    untrained = [
        (recipe, layout, run)
        for recipe, layout in plans
        for run in layout.runs
        if not is_made(layout.store, run.folder, read_inputs(layout, run))
    ]
    if not untrained:
        return
    for recipe, layout, run in untrained:
        _check_run(recipe, layout, run, progress)
    status: Any = ray.remote(**on_driver_node())(RunStatus).remote()
    control: Any = ray.remote(**on_driver_node())(RunControl).remote()
    job = uuid.uuid4().hex
    can_stop = should_stop is not never_stop
    tasks = [
        replace(_plan_run(recipe, layout, run, status, control, job), can_stop=can_stop)
        for recipe, layout, run in untrained
    ]
    stop = TrainStop(control, should_stop)
    _run_tasks(tasks, job, RunMonitor(progress), stop)
    if stop.is_wanted and not all(is_made(t.store, t.run.folder, t.inputs) for t in tasks):
        raise StoppedEarly


def _check_run(recipe: Recipe, layout: Layout, run: TrainRun, progress: Progress) -> None:
    """Check the inputs of a run, and drop what was trained on others.

    Raises:
        As for `train_runs`.
    """
    check_trackers(recipe)
    check_data(layout.corpus, *layout.aligned.values())
    _drop_stale(run, layout.store, read_inputs(layout, run), progress)
    if run.is_fused:
        _check_sources(recipe, layout, progress)


def _run_tasks(tasks: list[WorkerTask], job: str, monitor: RunMonitor, stop: "TrainStop") -> None:
    """Run tasks, as many at a time as the cluster has room for."""
    # The controller of Ray Train sets signal handlers, so each run has a process of its own.
    fit: Any = ray.remote(**on_driver_node(), max_retries=0)(_fit)
    max_running = _count_runs_at_once(tasks)
    scheduler = RunScheduler(tasks, job, monitor)
    status, control = tasks[0].status, tasks[0].control
    running: dict[Any, str] = {}
    try:
        while scheduler.waiting or running:
            started = scheduler.take(max_running - len(running)) if not stop.is_wanted else []
            monitor.expect({task.run.name: _describe_needs(task) for task in started})
            running |= {fit.remote(task): task.run.name for task in started}
            ended = _wait([*running])
            running = {run: name for run, name in running.items() if run not in ended}
            states: Any = ray.get(status.read.remote())
            monitor.report(states)
            _raise_recorded(control)
            scheduler.renew()
            _check_ended(ended, control)
            if stop.is_over(num_working=len({*running.values()} & {*states})):
                break
    finally:
        for run in running:
            ray.cancel(run, force=True)
        scheduler.release()


class TrainStop:
    """Stops all runs at a checkpoint once that is wanted, and bounds how long that may take."""

    def __init__(self, control: Any, should_stop: ShouldStop) -> None:
        """Request nothing yet.

        Args:
            control: The handle of the `RunControl` actor.
            should_stop: Whether the runs are to stop.
        """
        self.control, self.should_stop = control, should_stop
        self.deadline: float | None = None
        """Monotonic time until which checkpoints are waited for."""

    @property
    def is_wanted(self) -> bool:
        """Whether the stop is requested."""
        return self.deadline is not None

    def is_over(self, *, num_working: int) -> bool:
        """Request a stop if it is wanted; check whether its end has come, or it takes too long.

        Args:
            num_working: Runs with workers that have not ended; others have nothing to save.
        """
        if self.deadline is None and self.should_stop():
            ray.get(self.control.request_stop.remote())
            self.deadline = time.monotonic() + MAX_STOP_SECONDS
        if self.deadline is None:
            return False
        return num_working == 0 or time.monotonic() >= self.deadline


def _drop_stale(run: TrainRun, store: Store, inputs: dict[str, str], progress: Progress) -> None:
    """Drop a model and checkpoints that were trained on other rows than there are now."""
    record = read_done(store, run.folder)
    num_stale = Checkpoints(store, run.folder).remove_stale(inputs)
    if num_stale or (record is not None and not is_current(record["inputs"], inputs)):
        note = "it was trained on other rows than there are now: it is trained again"
        progress(ProgressEvent("train", run.name, note=note))
        store.remove(f"{run.folder}/{DONE_FILE}")


def _check_sources(recipe: Recipe, layout: Layout, progress: Progress) -> None:
    """Report the sources that are noise.

    Raises:
        UserError: No other source is left.
    """
    active, noise = select_active_sources(layout.aligned, recipe.fuse)
    if noise and not active:
        raise UserError(f"every source of the fusion, {', '.join(noise)}, is {NOISE}")
    for name in noise:
        progress(ProgressEvent("train", f"source {name}", note=NOISE))


def _wait(running: list[Any]) -> list[Any]:
    """Wait for `POLL_SECONDS` at most, and return the runs that have ended."""
    if not running:
        time.sleep(POLL_SECONDS)
        return []
    return ray.wait(running, timeout=POLL_SECONDS)[0]


def _raise_recorded(control: Any) -> None:
    """Raise the first non-retryable error that a worker has recorded, as it was."""
    for error in ray.get(control.read_errors.remote()):
        raise error from None


def _check_ended(ended: list[Any], control: Any) -> None:
    """Raise the error of a run that has failed; a recorded one names the cause better."""
    try:
        ray.get(ended)
    except RayTaskError:
        _raise_recorded(control)
        raise


class RunScheduler:
    """The runs that wait for room in the cluster, or for another job that trains them."""

    def __init__(self, tasks: list[WorkerTask], job: str, monitor: RunMonitor) -> None:
        self.waiting, self.monitor = [*tasks], monitor
        self.leases = {
            task.run.name: Lease(task.store, f"{task.run.folder}/lease.json", job) for task in tasks
        }

    def take(self, room: int) -> list[WorkerTask]:
        """Return up to `room` runs to start now, and drop those that another job has trained."""
        taken: list[WorkerTask] = []
        for task in [*self.waiting]:
            if len(taken) == room:
                break
            lease = self.leases[task.run.name]
            if is_made(task.store, task.run.folder, task.inputs):
                self.waiting.remove(task)
            elif lease.acquire():
                self.waiting.remove(task)
                taken.append(task)
            else:
                self.monitor.report_waiting(task.run.name, lease.holder)
        return taken

    def renew(self) -> None:
        """Renew the leases of the runs that this job trains."""
        for lease in self.leases.values():
            lease.renew()

    def release(self) -> None:
        """Release the leases of the runs that this job trains."""
        for lease in self.leases.values():
            lease.release()


def _count_runs_at_once(tasks: list[WorkerTask]) -> int:
    """Count the runs for which the cluster has or may get room, 1 at least.

    The workers of any more would time out.
    """
    settings, num_runs = tasks[0].recipe.train, len(tasks)
    for kind, per_worker in _worker_resources(tasks[0]).items():
        room = count_reachable(kind, settings.accelerator_type)
        needed = per_worker * settings.num_workers
        num_runs = min(num_runs, int(min(room, needed * num_runs) // needed))
    return max(1, num_runs)


def _worker_resources(task: WorkerTask) -> dict[str, float]:
    """Return the Ray resources of one worker."""
    settings = task.recipe.train
    resources = {"CPU": settings.cpus_per_worker}
    if task.use_gpu:
        resources["GPU"] = settings.gpus_per_worker or 1.0
    return resources


def _describe_needs(task: WorkerTask) -> str:
    """Describe the resources of all workers, for the progress note."""
    settings = task.recipe.train
    needs = describe_needs(_worker_resources(task), settings.accelerator_type)
    return f"{needs} free for each of {settings.num_workers} workers"


def _plan_run(
    recipe: Recipe, layout: Layout, run: TrainRun, status: Any, control: Any, job: str
) -> WorkerTask:
    gpus = recipe.train.gpus_per_worker
    kind = recipe.train.accelerator_type
    use_gpu = (count_default_gpus(kind) if gpus is None else gpus) > 0
    return WorkerTask(
        recipe=recipe,
        run=run,
        store=layout.store,
        corpus=layout.corpus,
        aligned=layout.aligned if run.is_fused else {},
        held_out=layout.held_out,
        use_gpu=use_gpu,
        status=status,
        control=control,
        inputs=read_inputs(layout, run),
        job=job,
    )


def _fit(task: WorkerTask) -> None:
    """Run one training to its end, retries included."""
    settings = task.recipe.train
    workers = settings.num_workers
    is_elastic = settings.min_workers not in (None, workers)
    if not is_elastic:  # an elastic run would rather start soon with fewer workers
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = WORKER_START_SECONDS
    with scratch_folder("ray") as scratch:
        trainer = TorchTrainer(
            run_worker,
            train_loop_config={"task": task},
            torch_config=TorchConfig(backend="nccl" if task.use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=(settings.min_workers or workers, workers) if is_elastic else workers,
                elastic_resize_monitor_interval_s=RESIZE_SECONDS,
                use_gpu=task.use_gpu,
                resources_per_worker=_worker_resources(task),
                accelerator_type=settings.accelerator_type,
                placement_strategy=settings.placement.upper(),
            ),
            run_config=ray.train.RunConfig(
                name="ray",
                # Of no use here: nothing is reported to Ray Train, which would open the user's
                # address by pyarrow, with other credentials and another idea of what an address may
                # hold. The controller runs on this node.
                storage_path=str(scratch),
                storage_filesystem=LocalFileSystem(),
                failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
            ),
        )
        trainer.fit()
