"""Parse a recipe's YAML and apply `section.key=value` overrides, before validation."""

import os
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import yaml

from rayfuse.config.addresses import mask_secrets
from rayfuse.config.base import UserError, user_error_from


class RecipeError(UserError):
    """The recipe cannot be run as it is written; the message names the setting and the remedy."""


def parse_yaml(text: str, what: str) -> Any:
    """Parse YAML into plain values; tags that would build other objects are refused.

    Args:
        text: The YAML.
        what: What the text is, for errors.

    Raises:
        RecipeError: The text is not valid YAML, or has such a tag.
    """
    with user_error_from(
        lambda error: RecipeError(
            f"{what} is not valid YAML: "
            f"{'nested too deep' if isinstance(error, RecursionError) else error}"
        )
    ):
        return yaml.load(text, _RecipeLoader)


class _RecipeLoader(yaml.SafeLoader):
    """Builds plain values; a key given twice is an error, as is a merge key.

    PyYAML silently takes the last of two values, and a kilobyte of merge keys (`<<`) expands to
    gigabytes.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        keys: set[str] = set()
        for key, _ in cast(list[tuple[yaml.Node, yaml.Node]], node.value):
            if key.tag == "tag:yaml.org,2002:merge":
                problem = "has a merge key '<<'; write the settings out"
            elif isinstance(key, yaml.ScalarNode) and key.value in keys:
                problem = f"gives the key {key.value!r} twice; remove one of them"
            else:
                keys.add(str(key.value))
                continue
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)


def parse_override(override: str) -> tuple[str, Any]:
    """Split one override `section.key=value` into the key and the value, parsed as YAML.

    Raises:
        RecipeError: The override has another form, or its value is not valid YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {shorten(override)} is not of the form section.key=value")
    return key, parse_yaml(text, f"override {shorten(override)}")


def list_changes(changes: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """List the settings that changes name, by dotted keys.

    A section's name with a dictionary stands for the settings in it, at any depth; a dotted key
    stands for its value, as on the command line.
    """
    found: list[tuple[str, Any]] = []
    for key, value in changes.items():
        if isinstance(value, Mapping) and "." not in key:
            found += _list_leaves(key, cast(Mapping[str, Any], value))
        else:
            found.append((key, to_plain(value)))
    return found


def _list_leaves(key: str, section: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in section.items():
        if isinstance(value, Mapping):
            found += _list_leaves(f"{key}.{name}", cast(Mapping[str, Any], value))
        else:
            found.append((f"{key}.{name}", to_plain(value)))
    return found


def to_plain(value: Any) -> Any:
    """Copy a value as what YAML has: dictionaries, lists and texts."""
    if isinstance(value, os.PathLike):
        return os.fspath(cast("os.PathLike[str]", value))
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in cast(Mapping[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in cast(Sequence[Any], value)]
    return value


def apply_change(values: dict[str, Any], key: str, value: Any) -> None:
    """Set one setting of the recipe's values, in place.

    A list's items are addressed by their `name` or their index: `sources.openllama.gpus`.

    Args:
        values: The recipe's values.
        key: The setting, by its dotted key.
        value: Its value.

    Raises:
        RecipeError: A part of the key is no section, or a list has no such item.
    """
    *sections, last = key.split(".")
    parent: Any = values
    for depth, part in enumerate(sections):
        parent = _find_child(parent, part, ".".join(sections[: depth + 1]))
    if isinstance(parent, list):
        parent = cast(list[Any], parent)
        parent[_find_item(parent, last, key)] = value
    else:
        parent[last] = value


def _find_child(parent: Any, part: str, key: str) -> Any:
    """Find the section or list under a key; a missing section is created.

    Args:
        parent: A section or a list.
        part: The key or the item.
        key: The path up to and including `part`, for errors.
    """
    if isinstance(parent, list):
        parent = cast(list[Any], parent)
        child = parent[_find_item(parent, part, key)]
    else:
        child = parent.setdefault(part, {})
    if not isinstance(child, dict | list):
        raise RecipeError(
            f"override of {key!r}: its value is {shorten(child)}, which has no keys; "
            "override the value itself"
        )
    return cast(Any, child)


def _find_item(items: list[Any], part: str, key: str) -> int:
    """Find the index of a list's item by its `name` or its number."""
    for index, item in enumerate(items):
        if isinstance(item, dict) and cast(dict[str, Any], item).get("name") == part:
            return index
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    raise RecipeError(f"override of {key!r}: the list has no item {part!r}")


class _Masked(reprlib.Repr):
    """Format values for errors, with credentials replaced by `***`."""

    def repr_str(self, x: str, level: int) -> str:
        # Before the string is shortened: a part of a secret might not match the pattern.
        return super().repr_str(mask_secrets(x), level)


# Limits are needed because a few YAML aliases can expand to gigabytes.
_REPR = _Masked()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, 80, 80


def shorten(value: object) -> str:
    """Format a value for an error message, without secrets and in at most 80 characters."""
    text = mask_secrets(_REPR.repr(value))
    return text if len(text) <= 80 else text[:77] + "..."
