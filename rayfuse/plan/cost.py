"""The cost model: work items and assumptions -> GPU-hours, dollars and warnings."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rayfuse.config.plan import GpuKind, PlanSettings
from rayfuse.plan.estimate import GIB, GpuWork, Work, estimate_steps, list_work
from rayfuse.plan.inputs import PlanInputs
from rayfuse.plan.outlook import describe_outlook
from rayfuse.train.order import advise_steps

ENOUGH_HELD_OUT_TOKENS = 1e7
"""Gives bits per byte to the fourth digit."""

MAX_HELD_OUT_TOKENS = 10 * ENOUGH_HELD_OUT_TOKENS
"""More than this is a waste of GPU time."""

MIN_VALIDATIONS, ENOUGH_VALIDATIONS = 5, 20
"""With fewer `publish: best` is hardly better than `last`; with enough, it finds the best step."""


@dataclass(frozen=True)
class GpuCost:
    """The cost of the remaining part of a work item on one kind of GPU."""

    fits: bool
    """Its memory fits into that of the GPU."""
    hours: float
    """GPU-hours on demand; spot instances repeat `plan.spot_lost_share` of them."""
    spot_dollars: float
    on_demand_dollars: float


@dataclass(frozen=True)
class RunPlan:
    """All work of a run and its cost."""

    work: tuple[Work, ...]
    costs: dict[str, dict[str, GpuCost]]
    """By title of a work item that needs GPUs, then by kind of GPU."""
    chosen: dict[str, str]
    """By title: the kind of GPU that the recipe names, else the one that fits at the lowest spot
    price."""
    other_dollars: dict[str, float]
    """By title: CPUs and requests of the remaining work."""
    stored_bytes: float
    month_dollars: float
    """Monthly price of the storage once the run is complete."""
    notes: tuple[str, ...]
    """Where the figures come from."""
    outlook: tuple[str, ...]
    """What fusion can be expected to gain."""
    warnings: tuple[str, ...]
    settings: PlanSettings = field(repr=False)


Rates = Mapping[tuple[str, str], float]
"""Measured tokens per second of one GPU, by title of a work item and kind of GPU."""


def make_plan(inputs: PlanInputs, rates: Rates | None = None) -> RunPlan:
    """Estimate the work and the cost of a run.

    Args:
        inputs: Sizes and progress of the run.
        rates: Rates that a probe has measured; they replace the assumed ones.
    """
    plan = inputs.recipe.plan
    work = tuple(list_work(inputs))
    gpu_work = {item.title: (item, item.gpu) for item in work if item.gpu is not None}
    costs = {
        title: {
            name: cost_on_gpu(item, gpu, (name, kind), plan, rates or {})
            for name, kind in plan.gpus.items()
        }
        for title, (item, gpu) in gpu_work.items()
    }
    chosen = {
        title: kind
        for title, (_, gpu) in gpu_work.items()
        if (kind := _choose_kind(gpu, costs[title], plan))
    }
    stored = sum(item.stored_bytes for item in work)
    return RunPlan(
        work=work,
        costs=costs,
        chosen=chosen,
        other_dollars={item.title: _other_dollars(item, plan) for item in work},
        stored_bytes=stored,
        month_dollars=stored / 1e9 * plan.dollars_per_gb_month,
        notes=tuple(inputs.notes),
        outlook=tuple(describe_outlook(inputs)),
        warnings=(*inputs.warnings, *list_warnings(inputs, work, costs)),
        settings=plan,
    )


def cost_on_gpu(
    work: Work, gpu: GpuWork, on: tuple[str, GpuKind], plan: PlanSettings, rates: Rates
) -> GpuCost:
    """Estimate the cost of a work item's remaining part on one kind of GPU."""
    name, kind = on
    left = 1 - work.done
    room = kind.memory_gib * GIB * plan.usable_memory_share * (gpu.gpus or 1.0)
    rate = rates.get((work.title, name)) or assumed_rate(work, gpu, kind, plan)
    computing = work.tokens * left / rate / 3600
    starting = plan.start_minutes / 60 * gpu.actors * (gpu.gpus or 1.0) if left else 0.0
    return GpuCost(
        fits=gpu.memory_bytes <= room,
        hours=computing + starting,
        spot_dollars=(computing * (1 + plan.spot_lost_share) + starting) * kind.spot_dollars,
        on_demand_dollars=(computing + starting) * kind.on_demand_dollars,
    )


def assumed_rate(work: Work, gpu: GpuWork, kind: GpuKind, plan: PlanSettings) -> float:
    """Compute the tokens per second of one GPU from its peak and the assumed share of it (MFU)."""
    if gpu.is_training:
        share = kind.train_share or plan.train_share
    else:
        share = (kind.forward_share or plan.forward_share) * plan.pipeline_share
    if gpu.takes_turns:
        share /= max(gpu.gpus, 1)
    return kind.peak_tflops * 1e12 * share / max(gpu.flops / max(work.tokens, 1), 1)


def sum_dollars(plan: RunPlan) -> tuple[float, float, float]:
    """Add up the remaining dollars: GPUs on spot, GPUs on demand, CPUs and requests."""
    chosen = [plan.costs[title][kind] for title, kind in plan.chosen.items()]
    return (
        sum(cost.spot_dollars for cost in chosen),
        sum(cost.on_demand_dollars for cost in chosen),
        sum(plan.other_dollars.values()),
    )


def _other_dollars(work: Work, plan: PlanSettings) -> float:
    requests = work.requests
    dollars = (requests.puts + requests.lists) / 1e6 * plan.dollars_per_million_puts
    dollars += requests.gets / 1e6 * plan.dollars_per_million_gets
    return (dollars + work.core_hours * plan.dollars_per_core_hour) * (1 - work.done)


def _choose_kind(gpu: GpuWork, costs: dict[str, GpuCost], plan: PlanSettings) -> str | None:
    fitting = [name for name, cost in costs.items() if cost.fits]
    if gpu.accelerator_type is not None:
        return gpu.accelerator_type if gpu.accelerator_type in fitting else None
    able = [name for name in fitting if plan.gpus[name].has_bfloat16 or not gpu.needs_bfloat16]
    return min(able, key=lambda name: costs[name].spot_dollars, default=None)


def list_warnings(
    inputs: PlanInputs, work: Sequence[Work], costs: dict[str, dict[str, GpuCost]]
) -> Iterator[str]:
    """Yield a warning for each setting that is likely to waste money or to fail."""
    recipe = inputs.recipe
    for item in work:
        if item.gpu is not None and item.done < 1:
            yield from _warn_of_gpus(item, item.gpu, costs[item.title], recipe.plan)
    for source in recipe.run_sources:
        if source.gpus == 0:
            yield (
                f"source {source.name} has gpus: 0 and will run on CPUs; its figures are those of "
                "a GPU"
            )
        if (source.max_actors or 1) > inputs.corpus.shards:
            yield (
                f"source {source.name} may have {source.max_actors} actors for "
                f"{inputs.corpus.shards} shards: lower corpus.shard_tokens, or max_actors"
            )
    yield from _warn_of_text(inputs)
    yield from _warn_of_training(inputs)
    if recipe.evaluate.tasks is not None:
        yield "evaluate.tasks are not included: their cost depends on their questions"


def _warn_of_gpus(
    work: Work, gpu: GpuWork, costs: dict[str, GpuCost], plan: PlanSettings
) -> Iterator[str]:
    needs = f"{work.title} needs {gpu.memory_bytes / GIB:,.0f} GiB per " + (
        "worker" if gpu.is_training else "actor"
    )
    fitting = [name for name, cost in costs.items() if cost.fits]
    wanted = gpu.accelerator_type
    if wanted is not None and wanted not in plan.gpus:
        yield (
            f"{work.title} has accelerator_type {wanted}, which is not in plan.gpus; "
            f"add it, or use one of {', '.join(plan.gpus)}"
        )
    elif wanted is not None and wanted not in fitting:
        yield f"{needs}, more than a {wanted} has; kinds that fit: {', '.join(fitting) or 'none'}"
    elif not fitting:
        remedy = (
            "raise train.num_workers or train.zero_stage, or set train.gradient_checkpointing, "
            "train.offload or train.lora"
            if gpu.is_training
            else "lower batch_tokens, or raise sources[].gpus"
        )
        yield f"{needs}, more than any kind of GPU in plan.gpus has: {remedy}"


def _warn_of_text(inputs: PlanInputs) -> Iterator[str]:
    recipe, corpus = inputs.recipe, inputs.corpus
    tokens = inputs.held_out.num_bytes / inputs.target.bytes_per_token
    if tokens > MAX_HELD_OUT_TOKENS:
        share = recipe.evaluate.held_out_share * ENOUGH_HELD_OUT_TOKENS / tokens
        remedy = (
            f"evaluate.held_out_share={share:.1g} is enough"
            if recipe.evaluate.documents is None
            else "fewer evaluate.documents are enough"
        )
        yield f"{tokens:,.0f} held-out tokens are scored by every model; {remedy}"
    mean = corpus.num_bytes / inputs.target.bytes_per_token / max(corpus.shards, 1)
    if corpus.shards > 1000 and mean < recipe.corpus.shard_tokens / 10:
        yield (
            f"shards have {mean:,.0f} tokens on average: every compressed file makes at least one; "
            "join the files"
        )


def _warn_of_training(inputs: PlanInputs) -> Iterator[str]:
    train, rows = inputs.recipe.train, math.ceil(inputs.corpus.num_bytes / inputs.row_bytes)
    advice = advise_steps(rows, train.rows_per_step, train.epochs, least=train.num_workers)
    if advice is not None:
        yield advice
    steps, interval = estimate_steps(inputs), train.checkpoint_every_steps
    if train.publish == "best" and steps // train.validate_every_steps < MIN_VALIDATIONS:
        yield (
            f"train.publish is best, but {steps} steps with a validation every "
            f"{train.validate_every_steps} have few; set train.validate_every_steps to "
            f"{max(steps // ENOUGH_VALIDATIONS, 1)}"
        )
    if interval >= steps > 100:
        yield (
            f"training has {steps} steps and a checkpoint every {interval}: a failure restarts it "
            "from step 0; lower train.checkpoint_every_steps"
        )
