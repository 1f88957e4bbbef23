"""A plan as tables for people and as plain values for programs."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from rayfuse.config.plan import GPU_KINDS, GpuKind, PlanSettings
from rayfuse.plan.cost import Plan
from rayfuse.plan.memory import GIB
from rayfuse.plan.work import GpuCost, Work

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def print_plan(plan: Plan, console: Console) -> None:
    """Print all of a plan: what is assumed, what there is to do, what it costs, what is wrong."""
    console.print(_tabulate_assumptions(plan.settings))
    console.print(_tabulate_kinds(plan))
    for sentence in plan.known:
        console.print(f"known: {sentence}", highlight=False)
    console.print(_tabulate_work(plan))
    console.print(_tabulate_costs(plan))
    spot, on_demand, other = sum_dollars(plan)
    console.print(
        f"what is left, on the kinds named above: GPUs {_dollars(spot)} on spot, "
        f"{_dollars(on_demand)} on demand; CPUs and requests {_dollars(other)}; what is stored in "
        f"the end, {_short(plan.stored_bytes)}B, costs {_dollars(plan.month_dollars)} a month",
        highlight=False,
    )
    console.print(
        "not counted: the head and what idles, traffic between regions, fetching documents and "
        "models, answers to evaluate.tasks",
        highlight=False,
    )
    for warning in plan.warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False)


def sum_dollars(plan: Plan) -> tuple[float, float, float]:
    """Return what is left in dollars: GPUs on spot, GPUs on demand, CPUs and requests."""
    chosen = [plan.costs[title][kind] for title, kind in plan.chosen.items()]
    return (
        sum(cost.spot_dollars for cost in chosen),
        sum(cost.on_demand_dollars for cost in chosen),
        sum(plan.other_dollars.values()),
    )


def to_values(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain values."""
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
        "known": list(plan.known),
        "warnings": list(plan.warnings),
        "assumptions": plan.settings.model_dump(mode="json"),
    }


def _tabulate_assumptions(settings: PlanSettings) -> Table:
    """Return every assumption with its value and what it means; `*` marks those changed."""
    table = Table("setting", "value", "what it is", title="what is assumed: plan.SETTING=VALUE")
    for name, value in list_assumptions(settings):
        field = PlanSettings.model_fields[name]
        mark = "" if value == field.default else "*"
        description = " ".join((field.description or "").split())
        table.add_row(name, f"{value:,.10g}{mark}", description)
    return table


def list_assumptions(settings: PlanSettings) -> Iterator[tuple[str, float]]:
    """Yield the assumptions that are numbers, with their names."""
    for name in PlanSettings.model_fields:
        value = getattr(settings, name)
        if isinstance(value, float):
            yield name, value


def _tabulate_kinds(plan: Plan) -> Table:
    table = Table(
        *("GPU", "Tflop/s", "GiB", "$/h spot", "$/h on demand", "forward", "training"),
        title="plan.gpus.GPU.SETTING=VALUE: prices as of mid 2025, rough; share of peak reached",
    )
    settings = plan.settings
    for name, kind in settings.gpus.items():
        is_known = name in GPU_KINDS and kind == GpuKind.model_validate(GPU_KINDS[name])
        table.add_row(
            name if is_known else f"{name}*",
            f"{kind.peak_tflops:g}",
            f"{kind.memory_gib:g}",
            f"{kind.spot_dollars:g}",
            f"{kind.on_demand_dollars:g}",
            f"{kind.forward_share or settings.forward_share:g}",
            f"{kind.train_share or settings.train_share:g}",
        )
    return table


def _tabulate_work(plan: Plan) -> Table:
    table = Table("work", "tokens", "shards", "done", "stored", title="what there is to do")
    for name in ("PUT", "GET", "LIST", "core-hours", "GiB of a GPU"):
        table.add_column(name, justify="right")
    for work in plan.work:
        requests = work.requests
        table.add_row(
            work.title,
            _short(work.tokens),
            f"{work.shards:,}",
            f"{work.done:.0%}",
            f"{_short(work.stored_bytes)}B" if work.stored_bytes else "",
            *(_short(each) for each in (requests.puts, requests.gets, requests.lists)),
            f"{work.core_hours:,.1f}" if work.core_hours else "",
            f"{work.gpu.memory_bytes / GIB:,.1f}" if work.gpu else "",
        )
    return table


def _tabulate_costs(plan: Plan) -> Table:
    table = Table(
        "work",
        title="what is left: GPU-hours, dollars on spot, dollars on demand; > is the kind chosen",
        show_lines=True,
    )
    for kind in plan.settings.gpus:
        table.add_column(kind, justify="right")
    for work in plan.work:
        costs = plan.costs.get(work.title)
        if costs:
            cells = (_describe_cost(plan, work, kind, cost) for kind, cost in costs.items())
            table.add_row(work.title, *cells)
    return table


def _describe_cost(plan: Plan, work: Work, kind: str, cost: GpuCost) -> str:
    if not cost.fits:
        return "does not\nfit"
    mark = "> " if plan.chosen.get(work.title) == kind else ""
    hours = f"{cost.hours:,.0f}" if cost.hours >= 100 else f"{cost.hours:,.1f}"
    return f"{mark}{hours} h\n{_dollars(cost.spot_dollars)}\n{_dollars(cost.on_demand_dollars)}"


def _dollars(value: float) -> str:
    return f"${value:,.2f}" if value < 10 else f"${value:,.0f}"


def _short(number: float) -> str:
    """Return a number to three digits, in thousands, millions, ..."""
    for size, prefix in PREFIXES:
        if number >= size * 0.9995:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g}"
