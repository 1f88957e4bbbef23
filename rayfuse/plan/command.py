"""What `rayfuse plan` does: a recipe or an example, planned."""

from rayfuse.plan.cost import Plan, make_plan
from rayfuse.plan.examples import EXAMPLES, read_example
from rayfuse.plan.setup import read_setup
from rayfuse.recipe import RecipeError, read_recipe


def read_plan(recipe: str | None, example: str | None, overrides: list[str]) -> Plan:
    """Return the plan of a recipe file or of an example.

    Raises:
        ValueError: Neither is given, one is wrong, or nothing is known of a size.
    """
    if example is not None:
        return make_plan(read_setup(read_example(example, overrides), is_example=True))
    if recipe is None:
        raise RecipeError(f"give a recipe, or --example {' or '.join(EXAMPLES)}")
    return make_plan(read_setup(read_recipe(recipe, overrides)))
