"""Run the test of a Python function, which runs in another process that cannot reach this one.

Beside it in the sandbox: `candidate.py`, the model's program; `tests.json`, its test, the
function's name, and the proof that this process prints if the test passes. Arguments and results
cross as JSON that has numbers, strings, lists, tuples, sets and dicts; other results equal nothing.
The module uses the standard library alone: it is copied into the sandbox.
"""

import builtins
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

PR_SET_DUMPABLE = 4
CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value: Any) -> Any:
    """Encode a value as [TYPE, CONTENT]: subtypes as their base, other iterables as iterators."""
    if value is None or isinstance(value, bool):
        return ["plain", value]
    for base in (int, float, str):
        if isinstance(value, base):
            return ["plain", base(value)]
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(value[key])] for key in value]]
    for name, base in CONTAINERS.items():
        if isinstance(value, base):
            return [name, [encode(item) for item in value]]
    if isinstance(value, Iterable):
        return ["iterator", [encode(item) for item in value]]
    return ["other", None]


def decode(encoded: Any) -> Any:
    """Decode what `encode` has made."""
    kind, content = encoded
    if kind == "plain":
        return content
    if kind == "dict":
        return {decode(key): decode(value) for key, value in content}
    if kind == "other":
        return object()
    items = [decode(item) for item in content]
    return CONTAINERS[kind](items) if kind in CONTAINERS else iter(items)


def serve(name: str) -> None:
    """Call a function of `candidate.py` with each line's arguments, and write back its result."""
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # the program's own input and output
        os.dup2(null, descriptor)
    program = ModuleType("candidate")
    with open("candidate.py", encoding="utf-8") as file:
        exec(compile(file.read(), "candidate.py", "exec"), vars(program))
    for line in requests:
        try:
            reply = {"value": encode(vars(program)[name](*decode(json.loads(line))))}
        except Exception as error:
            reply = {"error": type(error).__name__}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def judge() -> None:
    """Run the test with a function that asks the other process, and print the proof in the end."""
    # This process' memory and descriptors are closed to other processes of the same user.
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    with open("tests.json", encoding="utf-8") as file:
        task = json.load(file)
    os.remove("tests.json")
    command = [sys.executable, "-I", "-S", __file__, task["name"]]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        requests, replies = process.stdin, process.stdout
        assert requests is not None and replies is not None

        def candidate(*arguments: Any) -> Any:
            requests.write(json.dumps(encode(arguments)) + "\n")
            requests.flush()
            reply = json.loads(replies.readline())
            if "error" in reply:
                error = getattr(builtins, str(reply["error"]), Exception)
                is_error = isinstance(error, type) and issubclass(error, Exception)
                raise (error if is_error else Exception)("the function failed")
            return decode(reply["value"])

        names: dict[str, Any] = {}
        exec(task["test"], names)  # with the helpers of the prompt; not written by the model
        names[task["name"]] = candidate  # some tests call the function by its own name
        names["check"](candidate)
        process.kill()
    print(f"\n{task['proof']}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve(sys.argv[1])
    else:
        judge()
