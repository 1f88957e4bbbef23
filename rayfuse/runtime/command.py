"""How a command prints, fails and ends; imported by all, so it imports nothing that takes time."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from rayfuse.config.addresses import mask_secrets
from rayfuse.config.text import show_controls
from rayfuse.runtime.native_log import NATIVE_LOG

if TYPE_CHECKING:
    from rich.console import Console

FAILED, USER_ERROR, STOPPED, INTERRUPTED = 1, 2, 3, 130
"""Exit codes; 0 if all went well."""


class Interrupt(BaseException):
    """SIGTERM or SIGINT. Not a KeyboardInterrupt, which typer would handle itself."""


def interrupt(number: int, frame: object) -> None:
    """Handle a signal."""
    raise Interrupt


def is_interrupt(error: BaseException | None) -> bool:
    """Check whether an interrupt caused an error: Ray's compiled code makes it a SystemError."""
    while error is not None and not isinstance(error, Interrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def exit_interrupted() -> NoReturn:
    """Exit without waiting for threads: every result that counts is committed already."""
    print("rayfuse: interrupted; run the same command to resume", file=sys.stderr, flush=True)
    shut_down()
    NATIVE_LOG.report()
    sys.stdout.flush()
    os._exit(INTERRUPTED)


def shut_down() -> None:
    """Leave the cluster, while threads of a stage may still use it."""
    from rayfuse.runtime.connect import shutdown_now

    shutdown_now()


def print_error(message: str, code: int) -> int:
    """Print an error, and return the exit code."""
    print(f"rayfuse: error: {show_controls(mask_secrets(message))}", file=sys.stderr)
    return code


@dataclass
class CommandOutput:
    """Where a command prints for people, and the values that `--json` prints."""

    console: "Console"
    values: dict[str, Any] = field(default_factory=dict[str, Any])


@contextmanager
def command_output(as_json: bool, *, starts_ray: bool = False) -> Iterator[CommandOutput]:
    """Open a command's output; with `--json`, stdout gets its values as one JSON object at the end.

    Everything else that is printed then goes to stderr, also by other libraries. That is never
    undone: Ray prints warnings even after the command has ended. What compiled libraries print goes
    to a file if the command starts Ray.
    """
    from rayfuse.runtime import console, environment  # rich is not needed for --help

    environment.prepare_environment()
    if starts_ray and sys.stderr is sys.__stderr__:  # a process of its own, as `main` starts it
        NATIVE_LOG.open(environment.open_private_folder())
    stdout = sys.stdout
    if as_json:
        sys.stdout = sys.stderr
    output = CommandOutput(console.open_console(to_stderr=as_json))
    yield output
    if as_json:
        print(json.dumps(output.values), file=stdout)
