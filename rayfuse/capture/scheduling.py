"""What is left to capture of each source, and how many actors each may have."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rayfuse.capture.actor_memory import estimate_actor_memory
from rayfuse.capture.dtype import settle_dtype
from rayfuse.capture.engines.load import check_backend
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import SourceSettings
from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.models.files import read_model_files
from rayfuse.run.layout import Layout
from rayfuse.runtime.memory import MEMORY, NoRoomError
from rayfuse.runtime.progress import Progress, ProgressEvent
from rayfuse.runtime.resources import count_actor_gpus, count_reachable, reserve_memory
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.todo import list_missing

NEXT_STEP_CPUS = 0.5
"""CPUs of a task that runs the next step on freshly captured shards."""

NextStep = Callable[[int], None]
"""Runs on a shard, by its number, once it is captured: in a run, it aligns the shard."""

PlanStep = Callable[[Recipe, Layout, SourceSettings], NextStep]
"""Plans the next step of a source. An argument, since capture must not import later stages."""


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
    """Rows of the shards that are complete, estimated from their number: all have a similar length.
    """
    rejects_before: int
    """Rejected rows of the shards that are complete."""
    memory_bytes: float = 0.0
    """Host memory that one actor requests from Ray."""
    max_actors: int = 1


def plan_work(
    recipe: Recipe, layout: Layout, progress: Progress, then: PlanStep
) -> tuple[list[SourceWork], list[tuple[SourceSettings, NoRoomError]]]:
    """Plan the capture of every source that is incomplete; list those without room on any node.

    Args:
        recipe: The run's recipe.
        layout: Its data sets.
        progress: Receives a note per source that resumes.
        then: Plans what happens to each captured shard.

    Raises:
        UserError: A source's backend is not installed, its recorded dtype is corrupt, or no node
            has the memory of one of its actors and it is required.
    """
    work: list[SourceWork] = []
    refused: list[tuple[SourceSettings, NoRoomError]] = []
    for source in recipe.sources:
        if layout.captured[source.name].is_complete():
            continue
        try:
            work.append(_plan_source(recipe, layout, source, progress, then))
        except NoRoomError as error:
            if source.required:
                raise
            refused.append((source, error))
    return size_pools(work), refused


def _plan_source(
    recipe: Recipe, layout: Layout, source: SourceSettings, progress: Progress, then: PlanStep
) -> SourceWork:
    check_backend(source)
    captured, aligned = layout.captured[source.name], layout.aligned[source.name]
    is_first = captured.claim({"recipe": dump_recipe(recipe), "source": source.name})
    aligned.claim({"recipe": dump_recipe(recipe), "source": source.name})
    manifest = layout.corpus.read_manifest()
    assert manifest is not None, "the corpus is complete"
    num_shards = manifest.num_shards

    def note(text: str) -> None:
        progress(ProgressEvent("capture", source.name, note=text))

    todo = list_missing(captured, num_shards, note)
    done = set(range(num_shards)).difference(todo)
    if not is_first:
        # Another job may be capturing the same source: in random order both seldom take the same
        # shard, and the work of the slower one is lost only then.
        random.Random().shuffle(todo)
    gpus = count_actor_gpus(source)
    dtype = settle_dtype(captured, source.dtype, on_gpu=gpus > 0)
    if source.dtype == "auto" and not is_first:
        note(f"resumes in {dtype}, as it started")
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
        memory_bytes=_reserve_memory(recipe, layout, source, settings, gpus),
    )


def _reserve_memory(
    recipe: Recipe, layout: Layout, source: SourceSettings, settings: CaptureSettings, gpus: float
) -> float:
    """Decide how much host memory one actor requests.

    Raises:
        NoRoomError: No node has as much.
    """
    shard_tokens = max((commit.tokens for commit in layout.corpus.commits().values()), default=0)
    needed = estimate_actor_memory(source, settings, shard_tokens=shard_tokens, on_gpu=gpus > 0)
    setting = f"sources.{source.name}.memory_gib"
    needs = {"CPU": source.cpus, "GPU": gpus}
    return reserve_memory(needs, source.accelerator_type, needed, setting)


def size_pools(work: list[SourceWork]) -> list[SourceWork]:
    """Give each source as many actors as the cluster has, or may have, room for.

    Sources that need the same kind of GPU, or none, share what there is of it.
    """
    pools: dict[tuple[bool, str | None], list[SourceWork]] = {}
    for item in work:
        pools.setdefault((item.gpus > 0, item.source.accelerator_type), []).append(item)
    sized: list[SourceWork] = []
    for (on_gpu, accelerator_type), pool in pools.items():
        room = count_reachable("GPU" if on_gpu else "CPU", accelerator_type)
        if not on_gpu:
            room -= 2 * NEXT_STEP_CPUS  # else the actors take all CPUs, and nothing is aligned
        memory = count_reachable(MEMORY, accelerator_type)
        costs = [
            max(item.gpus if on_gpu else item.source.cpus, _price_memory(item, memory, room))
            for item in pool
        ]
        # More actors than shards are useless, and the reachable number may be infinite.
        useful = sum(cost * len(item.shards) for cost, item in zip(costs, pool, strict=True))
        weights = [_estimate_work(item) for item in pool]
        shares = allocate_actors(weights, costs, min(room, useful))
        for item, share in zip(pool, shares, strict=True):
            max_actors = item.source.max_actors or max(share, item.source.min_actors)
            sized.append(replace(item, max_actors=min(max_actors, max(len(item.shards), 1))))
    return sized


def _price_memory(work: SourceWork, memory: float, room: float) -> float:
    """Convert memory to CPUs or GPUs: an actor with a third of all memory costs a third of them."""
    if not work.memory_bytes or math.isinf(memory) or math.isinf(room):
        return 0.0
    return work.memory_bytes / memory * room


def _estimate_work(work: SourceWork) -> float:
    """Estimate a source's compute, up to a factor: the weights' bytes per shard left."""
    files = read_model_files(work.source)
    return float(files.num_bytes) * len(work.shards)


def allocate_actors(work: Sequence[float], costs: Sequence[float], room: float) -> list[int]:
    """Divide actors so that all sources finish at about the same time.

    Greedy: the source that would finish last gets the next actor, as long as one fits.

    Args:
        work: What is left of each source, in any unit proportional to its time on one actor.
        costs: GPUs (or CPUs) of one of its actors; above 0.
        room: GPUs (or CPUs) in total.

    Returns:
        Actors of each source, at least 1 even where there is no room: then the sources take turns.
    """
    counts = [1] * len(work)
    left = room - sum(costs)
    while True:
        # Sums of fractions of a GPU are rounded and may exceed the room by that.
        fitting = [i for i, cost in enumerate(costs) if cost <= left + 1e-9 and work[i] > 0]
        if not fitting:
            return counts
        slowest = max(fitting, key=lambda i: (work[i] / counts[i], -i))
        counts[slowest] += 1
        left -= costs[slowest]
