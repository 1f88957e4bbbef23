"""What `rayfuse plan` does: a recipe or an example, planned, printed and returned as values."""

from typing import Any

from rich.console import Console

from rayfuse.config.load import read_recipe
from rayfuse.config.overrides import RecipeError
from rayfuse.plan.cost import make_plan
from rayfuse.plan.examples import EXAMPLES, read_example
from rayfuse.plan.inputs import Setup, read_setup
from rayfuse.plan.show import print_plan, to_values


def run_plan(
    recipe: str | None, example: str | None, overrides: list[str], console: Console, *, probe: bool
) -> dict[str, Any]:
    """Print the plan of a recipe file or of an example, and return it as plain values.

    Raises:
        ValueError: Neither is given, one is wrong, nothing is known of a size, or there is nothing
            to probe.
    """
    setup = _read(recipe, example, overrides)
    if not probe:
        plan = make_plan(setup)
        print_plan(plan, console)
        return to_values(plan)
    if example is not None:
        raise RecipeError("--probe needs a recipe: an example has no models to measure")
    from rayfuse.plan import measure

    console.print(f"measuring, for {measure.PROBE_SECONDS:.0f} s at most", highlight=False)
    found = measure.run_probe(setup)
    plan = make_plan(setup, measure.rates_of(found, setup))
    print_plan(plan, console)
    measure.print_probe(found, setup, console)
    return to_values(plan) | {"probe": measure.to_values(found)}


def _read(recipe: str | None, example: str | None, overrides: list[str]) -> Setup:
    if example is not None:
        return read_setup(read_example(example, overrides), is_example=True)
    if recipe is None:
        raise RecipeError(f"give a recipe, or --example {' or '.join(EXAMPLES)}")
    return read_setup(read_recipe(recipe, overrides))
