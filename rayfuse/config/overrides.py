"""A recipe's YAML and the `section.key=value` that change it, before they are settings."""

import reprlib
from typing import Any, cast

import yaml

from rayfuse.config.base import SECRET_PATTERN, UserError


class RecipeError(UserError):
    """The recipe cannot be run as it is written; the message names the setting and the remedy."""


def parse_yaml(text: str, what: str) -> Any:
    """Return plain values: tags that would make anything else are refused.

    Raises:
        RecipeError: The text is not valid YAML.
    """
    try:
        return yaml.safe_load(text)
    except Exception as error:  # a scalar that is not what its tag says raises any kind
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise RecipeError(f"{what} is not valid YAML: {reason}") from error


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one value, as `section.key=value` says.

    Raises:
        RecipeError: There is no such place.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {shorten(override)} is not of the form section.key=value")
    value = parse_yaml(text, f"override {shorten(override)}")
    *sections, last = key.split(".")
    place: Any = values
    for depth, part in enumerate(sections):
        place = _step_into(place, part, ".".join(sections[: depth + 1]))
    if isinstance(place, list):
        place = cast(list[Any], place)
        place[_index(place, last, key)] = value
    else:
        place[last] = value


def _step_into(place: Any, part: str, key: str) -> Any:
    if isinstance(place, list):
        place = cast(list[Any], place)
        inner = place[_index(place, part, key)]
    else:
        inner = place.setdefault(part, {})
    if not isinstance(inner, dict | list):
        raise RecipeError(
            f"override of {key!r}: it is {shorten(inner)}, which has no keys of its own"
        )
    return cast(Any, inner)


def _index(items: list[Any], part: str, key: str) -> int:
    """Find an item of a list by its `name` or its number."""
    for index, item in enumerate(items):
        if isinstance(item, dict) and cast(dict[str, Any], item).get("name") == part:
            return index
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    raise RecipeError(f"override of {key!r}: the list has no item {part!r}")


class _Masked(reprlib.Repr):
    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(SECRET_PATTERN.sub("***", x), level)  # before it is cut short


_REPR = _Masked()  # never all of it: a few aliases of YAML can stand for gigabytes
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, 80, 80


def shorten(value: object) -> str:
    """Return a value as an error tells it: without secrets, and not all of it."""
    text = SECRET_PATTERN.sub("***", _REPR.repr(value))
    return text if len(text) <= 80 else text[:77] + "..."
