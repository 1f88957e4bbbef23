"""The limits of one command in hours and dollars, and how much of them it has used."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from rayfuse.config.base import UserError
from rayfuse.config.prices import price_actor, price_worker
from rayfuse.config.recipe import Recipe
from rayfuse.run.layout import Layout
from rayfuse.runtime.progress import Progress, ProgressEvent, StoppedEarly

STOP_STAGES = ("capture", "align", "train", "evaluate")
"""These stop by themselves where nothing is lost; the others between two progress events."""


@dataclass(frozen=True)
class Limits:
    """What one command may cost; earlier commands of the same recipe do not count."""

    max_hours: float | None = None
    """By the clock."""
    max_dollars: float | None = None
    """Of its workers."""


NO_LIMITS = Limits()


@dataclass
class Budget:
    """What a command may cost, and what it has cost so far. Read and written by several threads."""

    limits: Limits
    prices: Mapping[str, float] = field(default_factory=dict[str, float])
    """Dollars per hour of one worker, by the title of the progress events of its part."""
    worker_seconds: dict[str, float] = field(default_factory=dict[str, float])
    """Of this command so far, by title."""
    began: float = field(default_factory=time.monotonic)

    @property
    def is_limited(self) -> bool:
        """Whether there is any limit."""
        return self.limits != NO_LIMITS

    @property
    def max_dollars(self) -> float | None:
        """The limit in dollars."""
        return self.limits.max_dollars

    @property
    def hours(self) -> float:
        """Hours since the command began."""
        return (time.monotonic() - self.began) / 3600

    @property
    def dollars(self) -> float:
        """Dollars of the work that has a price."""
        used = [*self.worker_seconds.items()]  # a copy: threads add titles
        costs = (self.prices.get(title, 0.0) * seconds / 3600 for title, seconds in used)
        return sum(costs, start=0.0)

    def describe_reached(self) -> str:
        """Name the limit that is reached; empty if none is."""
        hours, dollars = self.limits.max_hours, self.limits.max_dollars
        if hours is not None and self.hours >= hours:
            return f"--max-hours {hours:g}"
        if dollars is not None and self.dollars >= dollars:
            return f"--max-dollars {dollars:g}"
        return ""

    def is_reached(self) -> bool:
        """Check whether a limit is reached."""
        return bool(self.describe_reached())

    def check(self) -> None:
        """Stop here if a limit is reached.

        Raises:
            StoppedEarly: One is.
        """
        if self.is_reached():
            raise StoppedEarly(self.describe_reached())

    def watch(self, progress: Progress) -> Progress:
        """Wrap a callback so that it also counts worker time, and stops stages that do not.

        Events of a stage that cannot stop by itself come after a committed result.
        """

        def report(event: ProgressEvent) -> None:
            if event.worker_seconds:
                self.worker_seconds[event.title] = event.worker_seconds
            progress(event)
            if event.stage not in STOP_STAGES:
                self.check()

        return report


def open_budget(recipe: Recipe, layout: Layout, stages: tuple[str, ...], limits: Limits) -> Budget:
    """Check limits and prices, and start the clock.

    Args:
        recipe: Its prices count.
        layout: Its run.
        stages: Those that will run.
        limits: The limits.

    Raises:
        UserError: A limit is not above 0, or dollars are limited and a worker has no price.
    """
    for name, limit in (("--max-hours", limits.max_hours), ("--max-dollars", limits.max_dollars)):
        if limit is not None and not (limit > 0 and math.isfinite(limit)):
            raise UserError(f"{name} is {limit:g}; give a number above 0")
    if limits.max_dollars is None:
        return Budget(limits)
    try:
        prices = _list_prices(recipe, layout, stages)
    except UserError as error:
        raise UserError(f"--max-dollars needs the price of every worker: {error}") from error
    return Budget(limits, prices)


def _list_prices(recipe: Recipe, layout: Layout, stages: tuple[str, ...]) -> dict[str, float]:
    """List the prices of the workers of these stages by the titles of their events.

    Raises:
        UserError: A worker has no price.
    """
    prices: dict[str, float] = {}
    if "capture" in stages or "evaluate" in stages:
        for source in recipe.run_sources:
            price = price_actor(source, recipe.plan)
            prices |= {f"capture {source.name}": price, f"evaluate {source.name}": price}
    if "train" in stages or "evaluate" in stages:
        price = price_worker(recipe.train, recipe.plan)
        prices |= {f"train {run.name}": price for run in layout.runs}
        # Models that are no source are scored by tasks like training workers; the ensemble on CPUs.
        sources = {source.name for source in recipe.run_sources}
        names = layout.evaluation.scores.keys() - sources - {"ensemble"}
        prices |= {f"evaluate {name}": price for name in names}
    return prices
