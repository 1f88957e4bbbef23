"""Mutations of files, of their bytes or of their JSON values, drawn by hypothesis."""

import copy
import json
import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

IS_LONG = bool(os.environ.get("RAYFUSE_LONG_FUZZ"))
"""`RAYFUSE_LONG_FUZZ=1`: more than 100,000 mutations in all instead of some thousand."""

LONG_FACTOR = 42

PAYLOADS = (
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\n",
    b"\r\n" * 50,
    b"{",
    b"}]",
    b'"',
    b"[" * 3000,
    b"\\ud800",
    b"1e999",
    b"-1",
    b"NaN",
    b"\x1b]52;c;AAAA\x07",
    b"[/b][link=x]",
    b"../../../",
    b"PAR1",
    b"\x1f\x8b",
    b"\x28\xb5\x2f\xfd",
)

VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "0",
    "[/b]",
    "\x1b[2J\u202e",
    "\ud800",
    "../../etc/passwd",
    "x" * 5000,
    [],
    {},
    [[]],
    [1, "a", None],
    {"a": {"b": []}},
)


DEEP = "3,000 nested lists"
"""Stands for a value that Python's encoder cannot write."""


def fuzz(examples: int) -> Any:
    """Build hypothesis' settings: a number of examples, many times as many in the long form."""
    return settings(
        max_examples=examples * (LONG_FACTOR if IS_LONG else 1),
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


Edit = tuple[str, float, float, bytes]
"""A kind, a place and a length as shares of the data, and bytes to put there."""

EDITS: dict[str, Callable[[bytes, int, int, bytes], bytes]] = {
    "flip": lambda data, at, size, new: (
        data[:at] + bytes([data[at] ^ (1 << size % 8)]) + data[at + 1 :] if data else new
    ),
    "insert": lambda data, at, size, new: data[:at] + new + data[at:],
    "overwrite": lambda data, at, size, new: data[:at] + new + data[at + len(new) :],
    "delete": lambda data, at, size, new: data[:at] + data[at + size :],
    "repeat": lambda data, at, size, new: data[: at + size] + data[at:],
    "truncate": lambda data, at, size, new: data[:at],
    "append": lambda data, at, size, new: data + new,
}

edits = st.lists(
    st.tuples(
        st.sampled_from(sorted(EDITS)),
        st.floats(0, 1, exclude_max=True),
        st.floats(0, 0.3),
        st.sampled_from(PAYLOADS) | st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=3,
)


def mutate_bytes(data: bytes, drawn: list[Edit]) -> bytes:
    """Apply edits to bytes."""
    for kind, place, length, new in drawn:
        data = EDITS[kind](data, int(place * len(data)), int(length * len(data)), new)
    return data


json_edits = st.lists(
    st.tuples(
        st.sampled_from(("replace", "remove", "add", "swap", "deepen", "rename")),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(VALUES) | st.integers() | st.floats() | st.text(max_size=20),
    ),
    min_size=1,
    max_size=3,
)


def mutate_json(value: Any, drawn: list[tuple[str, float, Any]]) -> bytes:
    """Apply edits to the values of a JSON document, and encode it."""
    root = [json.loads(json.dumps(value))]
    for kind, place, new in drawn:
        places = _list_places(root)
        holder, key = places[int(place * len(places))]
        is_root = holder is root and kind == "remove"
        _edit_value(holder, key, "replace" if is_root else kind, copy.deepcopy(new), places)
    text = json.dumps(root[0]).replace(f'"{DEEP}"', "[" * 3000 + "]" * 3000)
    return text.encode("utf-8", "surrogatepass")


def _edit_value(holder: Any, key: Any, kind: str, new: Any, places: list[tuple[Any, Any]]) -> None:
    if kind == "remove":
        del holder[key]
    elif kind == "add" and isinstance(holder[key], dict):
        holder[key]["another"] = new
    elif kind == "add" and isinstance(holder[key], list):
        holder[key].append(new)
    elif kind == "swap":
        other, other_key = places[len(str(new)) % len(places)]
        holder[key] = json.loads(json.dumps(other[other_key]))
    elif kind == "deepen":
        holder[key] = DEEP if new is None else [holder[key]]
    elif kind == "rename" and isinstance(holder, dict):
        holder[str(new)] = holder.pop(key)
    else:
        holder[key] = new


def _list_places(root: list[Any]) -> list[tuple[Any, Any]]:
    """List all values of a document, each by its holder and its key or index."""
    places: list[tuple[Any, Any]] = []
    waiting: list[Any] = [root]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            places.append((holder, key))
            if isinstance(holder[key], dict | list) and len(places) < 5000:
                waiting.append(holder[key])
    return places
