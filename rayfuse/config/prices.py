"""Prices of a run's workers, from the recipe's settings; an error names the one that is missing."""

from rayfuse.config.base import UserError
from rayfuse.config.models import SourceSettings
from rayfuse.config.plan import PlanSettings
from rayfuse.config.train import TrainSettings


def price_actor(source: SourceSettings, plan: PlanSettings) -> float:
    """Return the price of one actor of a source, in dollars per hour.

    It is `dollars_per_hour` of the source if that is set. Else that of its GPUs on demand, which
    covers their share of CPUs, or of its CPUs if it has no GPU.

    Raises:
        UserError: No setting gives it.
    """
    if source.dollars_per_hour is not None:
        return source.dollars_per_hour
    place = f"sources.{source.name}"
    gpus = _price_gpus(
        source.gpus, source.accelerator_type, plan, (f"{place}.gpus", f"{place}.accelerator_type")
    )
    if gpus is None:
        raise UserError(
            f"{place}.dollars_per_hour is not set, and without {place}.accelerator_type plan.gpus "
            f"gives no price; set one of the two, or {place}.gpus to 0"
        )
    return gpus or source.cpus * plan.dollars_per_core_hour


def price_worker(train: TrainSettings, plan: PlanSettings) -> float:
    """Return the price of one training worker, in dollars per hour: of its GPUs, else of its CPUs.

    Raises:
        UserError: No setting gives it.
    """
    names = ("train.gpus_per_worker", "train.accelerator_type")
    gpus = _price_gpus(train.gpus_per_worker, train.accelerator_type, plan, names)
    if gpus is None:
        raise UserError(
            "train.accelerator_type is not set, so that plan.gpus gives no price of a training "
            "worker; set it, or train.gpus_per_worker to 0"
        )
    return gpus or train.cpus_per_worker * plan.dollars_per_core_hour


def _price_gpus(
    gpus: float | None, kind: str | None, plan: PlanSettings, names: tuple[str, str]
) -> float | None:
    """Return the price of GPUs on demand, in dollars per hour; 0 without any, None if unknown.

    Args:
        gpus: How many; None for one if their type is given.
        kind: Their type.
        plan: The prices by type.
        names: The settings of number and type, for errors.

    Raises:
        UserError: The type has no price.
    """
    if gpus == 0:
        return 0.0
    if kind is None:
        return None
    if kind not in plan.gpus:
        raise UserError(
            f"{names[1]} is {kind!r}, which has no price in plan.gpus ({', '.join(plan.gpus)}); "
            f"add plan.gpus.{kind}, or set {names[0]} to 0"
        )
    return (1.0 if gpus is None else gpus) * plan.gpus[kind].on_demand_dollars
