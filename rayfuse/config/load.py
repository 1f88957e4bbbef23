"""Read a recipe file, apply overrides, and report every fault with its remedy."""

import copy
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import (
    ValidationError,
)

from rayfuse.config.base import Settings
from rayfuse.config.overrides import (
    RecipeError,
    apply_change,
    parse_override,
    parse_yaml,
    shorten,
)
from rayfuse.config.recipe import Recipe
from rayfuse.config.text import show_on_one_line

RENAMED_KEYS = {
    "storage_patience_seconds": "storage_retry_seconds",
    "corpus.recut": "corpus.resplit",
    "plan.tokenise_bytes_per_core_second": "plan.tokenize_bytes_per_core_second",
}
RENAMED_VALUES = {
    ("align.method", "mined"): "min_edit_distance",
    ("align.method", "statistics"): "cooccurrence",
}
"""Keys and values of older recipes, with the names that replaced them."""


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe from a YAML file and apply `section.key=value` overrides.

    Raises:
        RecipeError: The file cannot be read, or a setting is unknown or wrong; every fault is
            listed, with the setting, its value and the remedy.
    """
    return read_values(read_file(path), overrides or [])


def read_file(path: str | Path) -> dict[str, Any]:
    """Read the values of a recipe's YAML file, without checking them.

    Raises:
        RecipeError: The file cannot be read, or holds no settings.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error}") from error
    values = parse_yaml(text, f"the recipe {path}")
    if not isinstance(values, dict):
        raise RecipeError(f"the recipe {path} holds no settings; begin with `storage: FOLDER`")
    return cast(dict[str, Any], values)


def read_values(values: dict[str, Any], overrides: list[str]) -> Recipe:
    """Build a recipe from plain values and `section.key=value` overrides; `values` is not changed.

    Raises:
        RecipeError: As for `read_recipe`.
    """
    return change_values(values, [parse_override(override) for override in overrides])


def change_values(values: dict[str, Any], changes: Sequence[tuple[str, Any]]) -> Recipe:
    """Build a recipe from plain values and changed settings; `values` is not changed.

    Args:
        values: The recipe's values.
        changes: Dotted keys with the values that they get, in order.

    Raises:
        RecipeError: As for `read_recipe`.
    """
    changed = copy.deepcopy(values)
    for key, value in changes:
        apply_change(changed, key, value)
    return parse_recipe(changed)


def parse_recipe(values: dict[str, Any]) -> Recipe:
    """Build a recipe from plain values.

    Raises:
        RecipeError: As for `read_recipe`.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        faults = _drop_consequences(cast(list[dict[str, Any]], error.errors()))
        raise RecipeError("\n".join(map(_explain, faults))) from error


def _drop_consequences(faults: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop the fault of a list that is too short because its items have faults."""
    places = [fault["loc"] for fault in faults]

    def is_consequence(fault: dict[str, Any]) -> bool:
        place, depth = fault["loc"], len(fault["loc"])
        return fault["type"] == "too_short" and any(
            other[:depth] == place and len(other) > depth for other in places
        )

    return [fault for fault in faults if not is_consequence(fault)]


def _explain(fault: dict[str, Any]) -> str:
    """Describe one of pydantic's faults by setting, value and remedy."""
    setting = show_on_one_line(".".join(str(part) for part in fault["loc"])) or "the recipe"
    if setting in RENAMED_KEYS:
        return f"{setting} is now {RENAMED_KEYS[setting]}; rename it"
    value = fault["input"]
    if isinstance(value, str) and (setting, value) in RENAMED_VALUES:
        return f"{setting} {value!r} is now {RENAMED_VALUES[setting, value]!r}; rename it"
    if fault["type"] == "extra_forbidden":
        known = _known_keys(fault["loc"][:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{setting} is no setting of rayfuse; {remedy}"
    if fault["type"] == "missing":
        return f"{setting} is missing; it has no default, so the recipe must set it"
    if fault["type"] == "too_short":
        return f"{setting} is empty; give {fault['ctx']['min_length']} or more"
    message = fault["msg"].removeprefix("Value error, ")
    if isinstance(value, dict):  # the message names the settings in it
        return f"{setting}: {message}"
    return f"{setting} is {shorten(value)}: {message[0].lower()}{message[1:]}"


def _known_keys(location: tuple[str | int, ...]) -> list[str]:
    """List the keys that the settings at a location have, aliases for names."""
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        if part in fields:  # else it is the key of a dictionary
            model = _settings_within(fields[part].annotation)
    return [field.alias or name for name, field in model.model_fields.items()]


def _settings_within(annotation: Any) -> Any:
    """Find the Settings class inside a tuple, a union or an Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    found = (_settings_within(inner) for inner in get_args(annotation))
    return next((model for model in found if model), None)


if __name__ == "__main__":
    print(json.dumps(Recipe.model_json_schema(by_alias=True), indent=2))
