"""The capture stage: for each source a Ray Data stream of shards through actors with its LLM.

Blocks carry shard numbers, never the data: an actor reads a corpus shard, scores it and commits
the captured shard; a CPU task right behind it aligns it.
"""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayActorError
from ray.util.metrics import Counter

from rayfuse.capture.actor import CrashCounter
from rayfuse.capture.engines.base import LoadEngine
from rayfuse.capture.engines.load import check_backend, load_recipe_engine
from rayfuse.capture.scheduling import allocate_actors
from rayfuse.capture.shard import ShardCapturer, ShardNumbers
from rayfuse.capture.stats import LiveNumbers, to_line
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import DType, SourceSettings
from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.models.files import load_recipe_tokenizer, read_model_files
from rayfuse.run.layout import Layout
from rayfuse.run.segmentation import write_segmentation
from rayfuse.runtime.connect import find_root_cause, on_driver_node
from rayfuse.runtime.progress import Progress, ProgressEvent
from rayfuse.runtime.ray_internals import list_draining_nodes
from rayfuse.runtime.resources import (
    REPORT_WAIT_SECONDS,
    count_actor_gpus,
    count_reachable,
    describe_needs,
    gpu_options,
)
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.todo import list_missing, split_shards

CALLS_PER_ACTOR = 3
"""Shards in one actor at a time: one is read, one scored, one written."""

MAX_DEATHS = 5
"""Deaths in a row before an actor's first shard that are put up with: spot machines do go away."""

DRAIN_SECONDS = 5.0
"""Between two looks whether a machine is about to be taken away."""

NO_PROGRESS_SECONDS = 86_400
"""A day: machines with the right GPU may take long to come."""

METRICS_SECONDS = 15.0
"""Between two lines of metrics.jsonl."""

ALIGN_CPUS = 0.5


class CaptureActor:
    """Holds one source LLM. Ray builds it once, then calls it per shard, from several threads."""

    def __init__(
        self,
        source: SourceSettings,
        settings: CaptureSettings,
        corpus: DataSet,
        captured: DataSet,
        load_engine: LoadEngine,
        lives: Any,
    ) -> None:
        # A fault is raised in a call: here, Ray would build the actor again and again.
        self.fault: Exception | None = None
        self.actor, self.lives = ray.get_runtime_context().get_actor_id(), lives
        deaths: int = ray.get(lives.begin.remote(self.actor, source.name))  # pyright: ignore[reportAssignmentType]
        if deaths > MAX_DEATHS:
            self.fault = RuntimeError(_describe_deaths(source, deaths))
            return
        try:
            engine = load_engine(source, settings)
        except ValueError as error:
            self.fault = error
            return
        self.capturer = ShardCapturer(engine, load_recipe_tokenizer(source), corpus, captured)
        self.is_proven = False
        self.calls = threading.Semaphore(CALLS_PER_ACTOR)
        threading.Thread(target=self._leave_in_time, daemon=True).start()
        self.tags = {"source": source.name}
        self.tokens = Counter("rayfuse_capture_tokens", "Tokens scored", ("source",))
        self.busy = Counter("rayfuse_capture_busy_seconds", "The model computed", ("source",))
        self.idle = Counter("rayfuse_capture_idle_seconds", "The model waited", ("source",))

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Capture the shards that a batch names, and return a row of numbers for each."""
        if self.fault is not None:
            raise self.fault
        with self.calls:
            return pa.Table.from_pylist([self._capture(n) for n in batch["shard"].to_pylist()])

    def _capture(self, shard: int) -> dict[str, Any]:
        numbers = self.capturer.capture(shard)
        if not self.is_proven:
            self.is_proven = True
            self.lives.prove.remote(self.actor)
        if numbers.is_ours:
            if numbers.tokens:  # Ray refuses to count none
                self.tokens.inc(numbers.tokens, self.tags)
            self.busy.inc(numbers.busy_seconds, self.tags)
            self.idle.inc(numbers.idle_seconds, self.tags)
        return asdict(numbers)

    def _leave_in_time(self) -> None:
        """End this process once its machine is to be taken away and the shards in hand are done.

        Ray Data gives actors on such a machine no work, and leaves them there; one that dies it
        starts again, on another machine.
        """
        node = ray.get_runtime_context().get_node_id()
        while node not in list_draining_nodes():
            time.sleep(DRAIN_SECONDS)
        for _ in range(CALLS_PER_ACTOR):
            self.calls.acquire()
        os.kill(os.getpid(), signal.SIGKILL)


NextStep = Callable[[int], None]
"""What a CPU task does with a shard once it is captured; it gets the shard's number."""

PlanStep = Callable[[Recipe, Layout, SourceSettings], NextStep]


@dataclass(frozen=True)
class SourceWork:
    """What is left to do for one source."""

    source: SourceSettings
    shards: list[int]
    num_shards: int
    corpus: DataSet
    captured: DataSet
    aligned: DataSet
    next_step: NextStep
    gpus: float
    """Of one actor."""
    settings: CaptureSettings
    rows_before: int
    """Of the shards that are done; by their number, all being about as long."""
    rejects_before: int
    max_actors: int = 1


def capture_sources(
    recipe: Recipe,
    layout: Layout,
    progress: Progress,
    load_engine: LoadEngine = load_recipe_engine,
    *,
    then: PlanStep,
) -> None:
    """Capture and align what is missing of every source, all sources at once.

    Raises:
        ValueError: The corpus is not whole, a model cannot be used, or too many rows are rejected.
        StorageUnavailableError: The storage does not answer any more.
        RuntimeError: Actors die again and again before they have finished a shard.
    """
    if not layout.corpus.is_complete():
        raise ValueError("the corpus is not whole; run `rayfuse corpus` first")
    for rows in (layout.corpus_rows, layout.held_out_rows):
        write_segmentation(layout.store, rows)
    # For the whole process: Ray's context manager swaps a global, and each source has a thread.
    context = DataContext.get_current()
    context.max_consecutive_actor_init_deaths = MAX_DEATHS
    context.execution_no_progress_timeout_s = NO_PROGRESS_SECONDS
    work = plan_work(recipe, layout, progress, then)
    ended: SimpleQueue[BaseException | None] = SimpleQueue()
    lives: Any = ray.remote(**on_driver_node())(CrashCounter).remote()

    def tell_waiting(each: SourceWork) -> None:
        if not ray.get(lives.has_begun.remote(each.source.name)):
            source = each.source
            needs = describe_needs({"CPU": source.cpus, "GPU": each.gpus}, source.accelerator_type)
            note = f"waits for a node with {needs} free"
            progress(ProgressEvent("capture", each.source.name, note=note))

    def run(each: SourceWork) -> None:
        waiting = threading.Timer(REPORT_WAIT_SECONDS, tell_waiting, (each,))
        waiting.daemon = True
        waiting.start()
        try:
            _capture_source(each, progress, load_engine, lives)
        except BaseException as error:  # handed to the main thread
            reason = str(find_root_cause(error)).partition("\n")[0]
            progress(ProgressEvent("capture", each.source.name, note=f"stopped: {reason}"))
            ended.put(error)
        else:
            ended.put(None)
        finally:
            waiting.cancel()

    for each in work:
        # A daemon: when the main thread is told to stop, nothing waits for the sources to end.
        threading.Thread(target=run, args=(each,), daemon=True).start()
    errors = [error for error in (ended.get() for _ in work) if error is not None]
    if errors:
        raise errors[0]


def plan_work(
    recipe: Recipe, layout: Layout, progress: Progress, then: PlanStep
) -> list[SourceWork]:
    """Return what is left to do for each source that is not captured whole."""
    return _size_pools(
        [
            _plan_source(recipe, layout, source, progress, then)
            for source in recipe.sources
            if not layout.captured[source.name].is_complete()
        ]
    )


def _plan_source(
    recipe: Recipe, layout: Layout, source: SourceSettings, progress: Progress, then: PlanStep
) -> SourceWork:
    check_backend(source)
    captured, aligned = layout.captured[source.name], layout.aligned[source.name]
    is_first = captured.claim({"recipe": dump_recipe(recipe), "source": source.name})
    aligned.claim({"recipe": dump_recipe(recipe), "source": source.name})
    manifest = layout.corpus.read_manifest()
    assert manifest is not None, "the corpus is whole"
    num_shards = manifest.num_shards
    todo = list_missing(captured, num_shards)
    done = set(range(num_shards)).difference(todo)
    if not is_first:
        # Perhaps another job is at it: in another order both seldom take the same shard.
        random.Random().shuffle(todo)
    gpus = count_actor_gpus(source)
    dtype = settle_dtype(captured, source.dtype, on_gpu=gpus > 0)
    if source.dtype == "auto" and not is_first:
        note = f"goes on in {dtype}, as it was begun"
        progress(ProgressEvent("capture", source.name, note=note))
    settings = recipe.capture.model_copy(
        update={"batch_tokens": source.batch_tokens or recipe.capture.batch_tokens}
    )
    return SourceWork(
        source=source.model_copy(update={"dtype": dtype, "gpus": gpus}),
        shards=todo,
        num_shards=num_shards,
        corpus=layout.corpus,
        captured=captured,
        aligned=aligned,
        next_step=then(recipe, layout, source),
        gpus=gpus,
        settings=settings,
        rows_before=manifest.rows * len(done) // max(num_shards, 1),
        rejects_before=captured.count_rejects(done, num_shards),
    )


def settle_dtype(captured: DataSet, wanted: DType, *, on_gpu: bool) -> DType:
    """Return the precision of all shards of a capture; for `auto`, that of whoever began it.

    Raises:
        ValueError: What was written down then is damaged.
    """
    if wanted != "auto":
        return wanted
    name = f"{captured.folder}/dtype"
    captured.store.create(name, b"bfloat16" if on_gpu else b"float32")
    found = captured.store.read(name).decode(errors="replace")
    if found not in ("bfloat16", "float32"):
        raise ValueError(
            f"{captured.store.root}/{name} is damaged: it says {found!r}; write bfloat16 there if "
            "the shards come from GPUs, float32 if from CPUs"
        )
    return found


def _size_pools(work: list[SourceWork]) -> list[SourceWork]:
    """Return the work with as many actors for each source as the cluster has or may have room for.

    Sources that ask for the same kind of GPU, or for none, share what there is of it.
    """
    pools: dict[tuple[bool, str | None], list[SourceWork]] = {}
    for each in work:
        pools.setdefault((each.gpus > 0, each.source.accelerator_type), []).append(each)
    sized: list[SourceWork] = []
    for (on_gpu, kind), group in pools.items():
        weights = [
            float(read_model_files(each.source.model, each.source.revision).num_bytes)
            * len(each.shards)
            for each in group
        ]
        costs = [each.gpus if on_gpu else each.source.cpus for each in group]
        room = count_reachable("GPU" if on_gpu else "CPU", kind) - (not on_gpu) * 2 * ALIGN_CPUS
        useful = sum(cost * len(each.shards) for cost, each in zip(costs, group, strict=True))
        room = min(room, useful)
        for each, share in zip(group, allocate_actors(weights, costs, room), strict=True):
            most = each.source.max_actors or max(share, each.source.min_actors)
            sized.append(replace(each, max_actors=min(most, max(len(each.shards), 1))))
    return sized


def _capture_source(
    work: SourceWork, progress: Progress, load_engine: LoadEngine, lives: Any
) -> None:
    source = work.source
    if work.shards:
        live = LiveNumbers(
            source=source.name,
            num_shards=work.num_shards,
            done_before=work.num_shards - len(work.shards),
            batch_tokens=work.settings.batch_tokens,
            dollars_per_hour=source.dollars_per_hour,
            rows=work.rows_before,
            rejects=work.rejects_before,
        )
        log = MetricsLog(work.captured)
        for numbers in _stream_numbers(work, load_engine, lives):
            live.add(numbers)
            now = live.snapshot()
            note = now.describe(work.settings.batch_tokens)
            progress(
                ProgressEvent(
                    "capture", source.name, now.shards_done, now.num_shards, "shards", note
                )
            )
            log.write(to_line(now), is_last=now.shards_done == now.num_shards)
            live.check_rejects(work.settings.max_rejected_share)
    work.captured.finish(work.num_shards)
    if len(work.aligned.list_committed(work.num_shards)) == work.num_shards:
        work.aligned.finish(work.num_shards)  # else shards captured before are left to `align`


def _stream_numbers(
    work: SourceWork, load_engine: LoadEngine, lives: Any
) -> Iterator[ShardNumbers]:
    """Capture and align the shards of one source, and yield each one's numbers.

    Raises:
        RuntimeError: Actors die again and again before they have finished a shard.
    """
    try:
        for row in _build_stream(work, load_engine, lives).iter_rows():
            yield ShardNumbers(**row)
    except RayActorError as error:
        raise RuntimeError(_describe_deaths(work.source, MAX_DEATHS + 1)) from error


def _describe_deaths(source: SourceSettings, deaths: int) -> str:
    return (
        f"source {source.name}: {deaths} times in a row an actor died before it had finished a "
        f"shard with {source.model!r}; give it a machine with more memory or lower batch_tokens, "
        "then run the same command again"
    )


def _build_stream(work: SourceWork, load_engine: LoadEngine, lives: Any) -> ray.data.Dataset:
    source = work.source
    return (
        ray.data.from_arrow(split_shards(work.shards))
        .map_batches(
            CaptureActor,
            fn_constructor_args=(
                source,
                work.settings,
                work.corpus,
                work.captured,
                load_engine,
                lives,
            ),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=min(source.min_actors, work.max_actors),
                max_size=work.max_actors,
                # Ray adds actors once those there have 1.75 times the work they can take.
                max_tasks_in_flight_per_actor=2 * CALLS_PER_ACTOR,
                max_concurrent_calls_per_actor=CALLS_PER_ACTOR,
                enable_true_multi_threading=True,
            ),
            num_cpus=source.cpus,
            **gpu_options(work.gpus, source.accelerator_type),
        )
        .map_batches(
            partial(_run_next_step, next_step=work.next_step),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=ALIGN_CPUS,
        )
    )


class MetricsLog:
    """metrics.jsonl beside the shards: what earlier jobs wrote stays."""

    def __init__(self, data: DataSet) -> None:
        self.store, self.name = data.store, f"{data.folder}/metrics.jsonl"
        try:
            self.lines = self.store.read(self.name).decode().splitlines()
        except FileNotFoundError:
            self.lines: list[str] = []
        self.written = -METRICS_SECONDS

    def write(self, line: dict[str, object], *, is_last: bool) -> None:
        """Add a line, unless the one before is fresh."""
        if not is_last and time.monotonic() - self.written < METRICS_SECONDS:
            return
        self.written = time.monotonic()
        self.lines.append(json.dumps(line))
        self.store.write(self.name, ("\n".join(self.lines) + "\n").encode())


def _run_next_step(batch: pa.Table, next_step: NextStep) -> pa.Table:
    """Run the next step on freshly captured shards."""
    for shard in batch["shard"].to_pylist():
        next_step(shard)
    return batch
