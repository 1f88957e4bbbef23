"""The train stage: Ray Train workers around a DeepSpeed engine, with and without fusion at once."""

import os
import time
import uuid
from typing import Any

import ray
import ray.train
from ray.exceptions import RayTaskError
from ray.train.torch import TorchConfig, TorchTrainer

from rayfuse.config.recipe import Recipe
from rayfuse.fuse.source_filter import select_active_sources
from rayfuse.run.layout import Layout, TrainRun
from rayfuse.runtime.connect import on_driver_node
from rayfuse.runtime.progress import Progress
from rayfuse.runtime.resources import (
    REPORT_WAIT_SECONDS,
    count_default_gpus,
    count_reachable,
    describe_needs,
)
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.lease import Lease
from rayfuse.storage.store import Store
from rayfuse.train.monitor import RunState, RunStatus
from rayfuse.train.trackers import check_trackers
from rayfuse.train.worker import WorkerTask, run_worker

POLL_SECONDS = 0.5

NOISE = (
    "left out: it predicts no row better than chance; see that its weights and tokenizer "
    "belong together, or set fuse.skip_noise: false"
)

START_SECONDS = "3600"
"""An hour for the workers' machines to come, then they are asked for anew; Ray gives a minute."""

RESIZE_SECONDS = 30.0
"""Between two looks whether there is room for more workers."""


def is_trained(run: TrainRun, store: Store) -> bool:
    """Return whether a run's model is complete."""
    return "done.json" in store.sizes(run.folder)


def check_data(*data_sets: DataSet) -> None:
    """Raise unless all data sets are whole and hold rows.

    Raises:
        ValueError: One is not.
    """
    for data in data_sets:
        if not data.is_complete():
            raise ValueError(
                f"{data.folder} is not whole; run `rayfuse corpus`, `capture` and `align` first"
            )
        manifest = data.read_manifest()
        if manifest is None or not manifest.rows:
            raise ValueError(
                f"{data.folder} has no rows to train on; `rayfuse status` says why documents were "
                "rejected"
            )


def train_runs(recipe: Recipe, layout: Layout, progress: Progress) -> None:
    """Train every run that is not done yet, all at once if there is room.

    Raises:
        ValueError: A data set is not whole or has no rows, no source knows anything, or a tracker
            is not installed.
        ShardError: A shard is missing or damaged.
        FloatingPointError: Losses or gradients of several steps in a row are not finite.
        StorageUnavailableError: The storage does not answer any more.
    """
    runs = [run for run in layout.runs if not is_trained(run, layout.store)]
    if not runs:
        return
    check_trackers(recipe)
    check_data(layout.corpus, *layout.aligned.values())
    if any(run.is_fused for run in runs):
        _check_sources(recipe, layout, progress)
    board: Any = ray.remote(**on_driver_node())(RunStatus).remote()
    fit: Any = ray.remote(**on_driver_node(), max_retries=0)(_fit)
    job = uuid.uuid4().hex
    tasks = [_plan_run(recipe, layout, run, board, job) for run in runs]
    at_once = _count_runs_at_once(tasks)
    watch = RunMonitor(progress)
    queue = RunScheduler(tasks, job, watch)
    running: list[Any] = []
    try:
        while queue.waiting or running:
            taken = queue.take(at_once - len(running))
            watch.expect(taken)
            running += [fit.remote(task) for task in taken]
            ready, running = _wait(running)
            watch.look(ray.get(board.read.remote()))
            queue.renew()
            _end_runs(ready, board)
    finally:
        for each in running:
            ray.cancel(each, force=True)
        queue.release()


def _check_sources(recipe: Recipe, layout: Layout, progress: Progress) -> None:
    """Tell which sources are not heard, and raise where that leaves none."""
    heard, noise = select_active_sources(layout.aligned, recipe.fuse)
    if noise and not heard:
        raise ValueError(f"every source of the fusion, {', '.join(noise)}, is {NOISE}")
    for name in noise:
        progress(f"source {name}", 0, 0, note=NOISE)


def _wait(running: list[Any]) -> tuple[list[Any], list[Any]]:
    """Return the runs that have ended, and the others, after a while."""
    if not running:
        time.sleep(POLL_SECONDS)
        return [], []
    return ray.wait(running, timeout=POLL_SECONDS)


def _end_runs(ready: list[Any], board: Any) -> None:
    try:
        ray.get(ready)
    except RayTaskError:
        states: dict[str, RunState] = ray.get(board.read.remote())
        for state in states.values():
            if state.fault is not None:
                raise state.fault from None
        raise


class RunScheduler:
    """Runs that wait for room, or for another job that trains them."""

    def __init__(self, tasks: list[WorkerTask], job: str, watch: "RunMonitor") -> None:
        self.waiting, self.watch = [*tasks], watch
        self.holds = {
            task.run.name: Lease(task.store, f"{task.run.folder}/lease.json", job) for task in tasks
        }

    def take(self, room: int) -> list[WorkerTask]:
        """Return those that are to start now; what another job has done is dropped."""
        taken: list[WorkerTask] = []
        for task in [*self.waiting]:
            if len(taken) == room:
                break
            hold = self.holds[task.run.name]
            if is_trained(task.run, task.store):
                self.waiting.remove(task)
            elif hold.take():
                self.waiting.remove(task)
                taken.append(task)
            else:
                self.watch.tell_held(task.run.name, hold.holder)
        return taken

    def renew(self) -> None:
        """Say that we train what we have taken."""
        for hold in self.holds.values():
            hold.renew()

    def release(self) -> None:
        """Let other jobs have what we had taken."""
        for hold in self.holds.values():
            hold.release()


class RunMonitor:
    """Tells what is new on the board."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.told: dict[str, int] = {}
        self.held: set[str] = set()
        self.has_warned = False
        self.expected: dict[str, tuple[float, str]] = {}

    def expect(self, tasks: list[WorkerTask]) -> None:
        """Note runs that start now, to tell what is waited for if their workers do not come."""
        until = time.monotonic() + REPORT_WAIT_SECONDS
        self.expected |= {task.run.name: (until, _describe_needs(task)) for task in tasks}

    def look(self, states: dict[str, RunState]) -> None:
        """Report each run's step and what it has told since, and compare validations.

        Raises:
            Exception: A run's fault that trying again would not mend.
        """
        for name, (until, needs) in [*self.expected.items()]:
            if name in states:
                del self.expected[name]
            elif time.monotonic() > until:
                del self.expected[name]
                self.progress(f"train {name}", 0, 0, note=f"waits for nodes with {needs}")
        for name, state in states.items():
            for text in state.told[self.told.get(name, 0) :]:
                self.progress(f"train {name}", 0, 0, note=text)
            self.told[name] = len(state.told)
            if state.num_steps:
                title = f"train {name}"
                self.progress(title, state.step, state.num_steps, "steps", state.note)
            if state.fault is not None:
                raise state.fault
        if {"fused", "clm"} <= set(states):
            self._compare(states["fused"], states["clm"])

    def tell_held(self, name: str, holder: str) -> None:
        """Say, once, that another job trains a run."""
        if name not in self.held:
            self.held.add(name)
            note = f"{holder} trains it already; this job waits, and takes over if that one dies"
            self.progress(f"train {name}", 0, 0, note=note)

    def _compare(self, fused: RunState, clm: RunState) -> None:
        """Warn early where fusion is worse than the same training without it."""
        common = sorted(set(fused.validations) & set(clm.validations))
        if self.has_warned or not common:
            return
        step = common[-1]
        if fused.validations[step] > clm.validations[step]:
            self.has_warned = True
            text = (
                f"warning: at step {step} fusion is worse on held-out rows, "
                f"{fused.validations[step]:.4f} bits a byte against {clm.validations[step]:.4f} "
                "without it; look at the sources' own scores, or raise train.lambda"
            )
            self.progress("train fused", 0, 0, note=text)


def _count_runs_at_once(tasks: list[WorkerTask]) -> int:
    """Return how many runs the cluster has or may have room for; others would time out."""
    settings, most = tasks[0].recipe.train, len(tasks)
    for kind, each in _worker_resources(tasks[0]).items():
        room = count_reachable(kind, settings.accelerator_type)
        needed = each * settings.num_workers
        most = min(most, int(min(room, needed * most) // needed))
    return max(1, most)


def _worker_resources(task: WorkerTask) -> dict[str, float]:
    """Return what one worker asks of Ray."""
    settings = task.recipe.train
    resources = {"CPU": settings.cpus_per_worker}
    if task.use_gpu:
        resources["GPU"] = settings.gpus_per_worker or 1.0
    return resources


def _describe_needs(task: WorkerTask) -> str:
    """Describe what all workers need, for the progress note."""
    settings = task.recipe.train
    needs = describe_needs(_worker_resources(task), settings.accelerator_type)
    return f"{needs} free for each of {settings.num_workers} workers"


def _plan_run(recipe: Recipe, layout: Layout, run: TrainRun, board: Any, job: str) -> WorkerTask:
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
        board=board,
        job=job,
    )


def _fit(task: WorkerTask) -> None:
    """Run one training to its end; in a process of its own, as Ray Train sets signal handlers."""
    settings = task.recipe.train
    workers = settings.num_workers
    is_elastic = settings.min_workers not in (None, workers)
    if not is_elastic:  # else it is to look again soon whether there are more, or fewer
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = START_SECONDS
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
            storage_path=f"{task.store.root}/{task.run.folder}",
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
        ),
    )
    trainer.fit()
