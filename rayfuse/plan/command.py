"""`rayfuse plan`: plan a recipe or an example, and print it as tables or as plain values."""

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from rayfuse.config.overrides import RecipeError
from rayfuse.config.plan import GPU_KINDS, GpuKind, PlanSettings
from rayfuse.config.recipe import Recipe
from rayfuse.plan.cost import GpuCost, RunPlan, assumed_rate, make_plan, sum_dollars
from rayfuse.plan.estimate import GIB, Work, list_work
from rayfuse.plan.inputs import PlanInputs, list_examples, read_example, read_inputs
from rayfuse.plan.probe import (
    MAX_PROBE_SECONDS,
    SMALL_BYTES,
    Measurement,
    Probe,
    ProbeRequest,
    find_kind,
    list_calibrations,
    probe_locally,
    rates_of,
    run_probe,
    share_of_peak,
)

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def plan_example(
    example: str | None, overrides: list[str], console: Console, *, probe: bool
) -> dict[str, Any]:
    """Print the plan of an example, and return it as plain values.

    Raises:
        UserError: There is no example of that name, an override is invalid, or it would be probed.
    """
    if example is None:
        raise RecipeError(f"give a recipe, or --example {' or '.join(list_examples())}")
    inputs = read_inputs(read_example(example, overrides), is_example=True)
    if probe:
        raise RecipeError("--probe needs a recipe: an example has no models to measure")
    plan = make_plan(inputs)
    print_plan(plan, console)
    return plan_to_values(plan)


def plan_recipe(recipe: Recipe, console: Console, *, probe: bool) -> dict[str, Any]:
    """Print the plan of a recipe, and return it as plain values.

    Raises:
        UserError: A size is unknown, or there is nothing to probe.
    """
    inputs = read_inputs(recipe)
    if not probe:
        plan = make_plan(inputs)
        print_plan(plan, console)
        return plan_to_values(plan)
    console.print(f"measuring, for at most {MAX_PROBE_SECONDS:.0f} s", highlight=False)
    found = run_probe(inputs, _choose_measure(inputs))
    plan = make_plan(inputs, rates_of(found, inputs))
    print_plan(plan, console)
    print_probe(found, inputs, console)
    return plan_to_values(plan) | {"probe": asdict(found)}


def _choose_measure(inputs: PlanInputs) -> Callable[[ProbeRequest], list[Measurement]]:
    """Choose the cluster of RAY_ADDRESS if it is set, else this machine."""
    if not os.environ.get("RAY_ADDRESS"):
        return probe_locally
    # Without a cluster a probe does not import ray.
    from rayfuse.plan.stage import probe_on_cluster

    return partial(probe_on_cluster, inputs.recipe)


def print_plan(plan: RunPlan, console: Console) -> None:
    """Print a plan: its assumptions, the work, its cost, and warnings."""
    console.print(_tabulate_assumptions(plan.settings))
    console.print(_tabulate_kinds(plan))
    for note in plan.notes:
        console.print(f"input: {note}", highlight=False)
    console.print(_tabulate_work(plan))
    console.print(_tabulate_costs(plan))
    spot, on_demand, other = sum_dollars(plan)
    console.print(
        f"remaining cost on the selected GPUs: {_format_dollars(spot)} on spot, "
        f"{_format_dollars(on_demand)} on demand; CPUs and requests {_format_dollars(other)}; "
        f"storage of {_format_number(plan.stored_bytes)}B {_format_dollars(plan.month_dollars)} "
        "per month",
        highlight=False,
    )
    console.print(
        "not included: the head node and idle nodes, traffic between regions, downloads of "
        "documents and models, evaluate.tasks",
        highlight=False,
    )
    for sentence in plan.outlook:
        console.print(f"fusion: {sentence}", highlight=False)
    for warning in plan.warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False)


def plan_to_values(plan: RunPlan) -> dict[str, Any]:
    """Convert a plan to plain values for JSON."""
    spot, on_demand, other = sum_dollars(plan)
    return {
        "work": [
            asdict(work)
            | {
                "title": work.title,
                "other_dollars": plan.other_dollars[work.title],
                "gpu_costs": {
                    kind: asdict(cost) for kind, cost in plan.costs.get(work.title, {}).items()
                },
                "chosen": plan.chosen.get(work.title),
            }
            for work in plan.work
        ],
        "stored_bytes": plan.stored_bytes,
        "dollars": {
            "gpus_spot": spot,
            "gpus_on_demand": on_demand,
            "cpus_and_requests": other,
            "storage_a_month": plan.month_dollars,
        },
        "notes": list(plan.notes),
        "outlook": list(plan.outlook),
        "warnings": list(plan.warnings),
        "assumptions": plan.settings.model_dump(mode="json"),
    }


def _tabulate_assumptions(settings: PlanSettings) -> Table:
    """Tabulate every assumption with its value and meaning; `*` marks values that were changed."""
    table = Table("setting", "value", "meaning", title="assumptions: plan.SETTING=VALUE")
    for name, value in list_assumptions(settings):
        field = PlanSettings.model_fields[name]
        mark = "" if value == field.default else "*"
        description = " ".join((field.description or "").split())
        table.add_row(name, f"{value:,.10g}{mark}", description)
    return table


def list_assumptions(settings: PlanSettings) -> Iterator[tuple[str, float]]:
    """Yield the names and values of the assumptions that are numbers."""
    for name in PlanSettings.model_fields:
        value = getattr(settings, name)
        if isinstance(value, float):
            yield name, value


def _tabulate_kinds(plan: RunPlan) -> Table:
    table = Table(
        *("GPU", "Tflop/s", "GiB", "$/h spot", "$/h on demand", "forward MFU", "training MFU"),
        title="plan.gpus.GPU.SETTING=VALUE: rough prices as of mid 2025; assumed MFU",
    )
    settings = plan.settings
    for name, kind in settings.gpus.items():
        is_default = name in GPU_KINDS and kind == GpuKind.model_validate(GPU_KINDS[name])
        table.add_row(
            name if is_default else f"{name}*",
            f"{kind.peak_tflops:g}",
            f"{kind.memory_gib:g}",
            f"{kind.spot_dollars:g}",
            f"{kind.on_demand_dollars:g}",
            f"{kind.forward_share or settings.forward_share:g}",
            f"{kind.train_share or settings.train_share:g}",
        )
    return table


def _tabulate_work(plan: RunPlan) -> Table:
    table = Table("work", "tokens", "shards", "done", "stored", title="work")
    for name in ("PUT", "GET", "LIST", "core-hours", "GiB per GPU"):
        table.add_column(name, justify="right")
    for work in plan.work:
        requests = work.requests
        table.add_row(
            work.title,
            _format_number(work.tokens),
            f"{work.shards:,}",
            f"{work.done:.0%}",
            f"{_format_number(work.stored_bytes)}B" if work.stored_bytes else "",
            *(_format_number(count) for count in (requests.puts, requests.gets, requests.lists)),
            f"{work.core_hours:,.1f}" if work.core_hours else "",
            f"{work.gpu.memory_bytes / GIB:,.1f}" if work.gpu else "",
        )
    return table


def _tabulate_costs(plan: RunPlan) -> Table:
    table = Table(
        "work",
        title="remaining GPU-hours, dollars on spot, dollars on demand; > marks the selected GPU",
        show_lines=True,
    )
    for kind in plan.settings.gpus:
        table.add_column(kind, justify="right")
    for work in plan.work:
        costs = plan.costs.get(work.title)
        if costs:
            cells = (_format_cost(plan, work, kind, cost) for kind, cost in costs.items())
            table.add_row(work.title, *cells)
    return table


def _format_cost(plan: RunPlan, work: Work, kind: str, cost: GpuCost) -> str:
    if not cost.fits:
        return "does not\nfit"
    mark = "> " if plan.chosen.get(work.title) == kind else ""
    hours = f"{cost.hours:,.0f}" if cost.hours >= 100 else f"{cost.hours:,.1f}"
    dollars = (_format_dollars(cost.spot_dollars), _format_dollars(cost.on_demand_dollars))
    return "\n".join([f"{mark}{hours} h", *dollars])


def _format_dollars(value: float) -> str:
    return f"${value:,.2f}" if value < 10 else f"${value:,.0f}"


def _format_number(number: float) -> str:
    """Format a number with three digits and an SI prefix."""
    for size, prefix in PREFIXES:
        if number >= size * 0.9995:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g}"


def print_probe(probe: Probe, inputs: PlanInputs, console: Console) -> None:
    """Print the measured rates beside the assumed ones, and the settings that adopt them."""
    table = Table(
        *("work", "device", "tokens/s", "assumed", "MFU", "hours on one GPU"),
        title=f"measured in {probe.seconds:.0f} s",
    )
    works = {work.title: work for work in list_work(inputs)}
    for measurement in probe.measured:
        table.add_row(*_format_measurement(measurement, works[measurement.title], inputs))
    console.print(table)
    storage = probe.storage
    if storage is not None:
        console.print(
            f"storage latency from here: {SMALL_BYTES:,} bytes written in "
            f"{storage.put_seconds:.3f} s, read in {storage.get_seconds:.3f} s; "
            f"{storage.shard_bytes:,} bytes written in {storage.shard_put_seconds:.2f} s, "
            f"read in {storage.shard_get_seconds:.2f} s",
            highlight=False,
        )
    for setting in list_calibrations(probe, inputs):
        console.print(f"to plan with the measured MFU, set {setting}", highlight=False)


def _format_measurement(measurement: Measurement, work: Work, inputs: PlanInputs) -> list[str]:
    title, device, rate = measurement.title, measurement.device, measurement.tokens_per_second
    if rate is None:
        return [title, device, measurement.note]
    plan = inputs.recipe.plan
    kind = find_kind(device, plan.gpus)
    hours = work.tokens * (1 - work.done) / rate / 3600
    cells = [title, device, f"{rate:,.0f}", "", "", f"{hours:,.1f}"]
    if kind is not None and work.gpu is not None:
        cells[3] = f"{assumed_rate(work, work.gpu, plan.gpus[kind], plan):,.0f}"
        cells[4] = f"{share_of_peak(rate, work, inputs, kind):.0%}"
    return cells
