"""The cost model: lines of work and assumptions -> GPU-hours and money by kind of GPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from rayfuse.config.plan import GpuKind, PlanSettings
from rayfuse.plan.doubts import list_warnings
from rayfuse.plan.estimate import list_work
from rayfuse.plan.inputs import Setup
from rayfuse.plan.memory import GIB
from rayfuse.plan.work import GpuCost, GpuWork, Work


@dataclass(frozen=True)
class Plan:
    """The whole plan."""

    work: tuple[Work, ...]
    costs: dict[str, dict[str, GpuCost]]
    """By line with GPU work, then by kind of GPU."""
    chosen: dict[str, str]
    """By line: the kind that the recipe asks for, else the cheapest on spot of those that fit."""
    other_dollars: dict[str, float]
    """By line: CPUs and requests of what is left."""
    stored_bytes: float
    month_dollars: float
    """For what is stored in the end, a month."""
    known: tuple[str, ...]
    warnings: tuple[str, ...]
    settings: PlanSettings = field(repr=False)


Rates = Mapping[tuple[str, str], float]
"""Measured tokens a second of one GPU, by line of work and kind of GPU."""


def make_plan(setup: Setup, rates: Rates | None = None) -> Plan:
    """Return what a run takes and costs.

    Args:
        setup: Where it starts from.
        rates: What a probe has measured; it goes before what is assumed.
    """
    plan = setup.recipe.plan
    work = tuple(list_work(setup))
    costs = {
        each.title: {
            name: cost_on_gpu(each, each.gpu, (name, kind), plan, rates or {})
            for name, kind in plan.gpus.items()
        }
        for each in work
        if each.gpu is not None
    }
    chosen = {
        each.title: kind
        for each in work
        if each.gpu is not None and (kind := _choose_kind(each.gpu, costs[each.title], plan))
    }
    stored = sum(each.stored_bytes for each in work)
    return Plan(
        work=work,
        costs=costs,
        chosen=chosen,
        other_dollars={each.title: _other_dollars(each, plan) for each in work},
        stored_bytes=stored,
        month_dollars=stored / 1e9 * plan.dollars_per_gb_month,
        known=tuple(setup.known),
        warnings=(*setup.warnings, *list_warnings(setup, work, costs)),
        settings=plan,
    )


def cost_on_gpu(
    work: Work, gpu: GpuWork, on: tuple[str, GpuKind], plan: PlanSettings, rates: Rates
) -> GpuCost:
    """Return what is left of a line of work costs on a kind of GPU."""
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
    """Return the tokens a second that one GPU is taken to do."""
    if gpu.is_training:
        share = kind.train_share or plan.train_share
    else:
        share = (kind.forward_share or plan.forward_share) * plan.pipeline_share
    return kind.peak_tflops * 1e12 * share / max(gpu.flops / max(work.tokens, 1), 1)


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
