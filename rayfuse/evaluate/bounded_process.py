"""Run a command with all processes that it starts, within limits of time, memory and output."""

import os
import selectors
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

POLL_SECONDS = 0.1
"""Between two readings of the memory of a process tree."""

CGROUPS = Path("/sys/fs/cgroup")
"""Where cgroup v2 is mounted; with version 1 it has no `cgroup.subtree_control`."""

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Limits:
    """What a command may use together with all processes that it starts."""

    seconds: int
    """Of wall-clock time."""
    memory_bytes: int
    output_bytes: int


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    exit_code: int
    output: bytes
    """Standard output and error, in the order of writing."""
    exceeded: str = ""
    """The limit for which it was killed, if it was."""


def run_bounded(command: Sequence[str], path: str, limits: Limits) -> Ended:
    """Run a command until it ends, or kill it at a limit.

    The limits are enforced from outside: the command shares nothing with this process but the pipe
    of its output. Its environment holds nothing but PATH.

    Args:
        command: The program and its arguments. When it is killed, it must take along all that it
            started, as `unshare --kill-child` does.
        path: Where the program and its own programs are found.
        limits: What it may use.
    """
    until, output = time.monotonic() + limits.seconds, bytearray()
    with (
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"PATH": path},
            start_new_session=True,  # a signal to its process group reaches only the command
        ) as process,
        selectors.DefaultSelector() as selector,
    ):
        assert process.stdout is not None
        selector.register(process.stdout, selectors.EVENT_READ)
        measure_at, exceeded = 0.0, ""
        while not exceeded and (selector.get_map() or process.poll() is None):
            if not selector.get_map():
                time.sleep(POLL_SECONDS)
            elif selector.select(POLL_SECONDS):
                chunk = os.read(process.stdout.fileno(), 2**16)
                output += chunk
                if not chunk:
                    selector.unregister(process.stdout)
            if len(output) > limits.output_bytes:
                exceeded = f"more than {limits.output_bytes:,} bytes of output"
            elif time.monotonic() >= until:
                exceeded = f"more than {limits.seconds} s"
            elif time.monotonic() >= measure_at:
                measure_at = time.monotonic() + POLL_SECONDS
                if measure_tree_bytes(process.pid) > limits.memory_bytes:
                    exceeded = f"more than {limits.memory_bytes:,} bytes of memory"
        if exceeded:
            process.kill()
    return Ended(process.returncode, bytes(output), exceeded)


def measure_tree_bytes(process: int) -> int:
    """Sum the private memory of a process and its descendants, in bytes; 0 if it has ended."""
    folder = Path("/proc", str(process))
    with suppress(OSError):  # a process may end at any time
        children = " ".join(file.read_text() for file in folder.glob("task/*/children")).split()
        _, resident, shared, *_ = map(int, (folder / "statm").read_text().split())
        return (resident - shared) * PAGE_BYTES + sum(measure_tree_bytes(int(c)) for c in children)
    return 0


def find_cgroup_parent(own: str, root: Path = CGROUPS) -> Path | None:
    """Find the nearest cgroup above this process in which it may limit another one.

    Only a cgroup that passes the controllers `memory` and `pids` on can, and one with processes of
    its own does not, except the root. It is found on a node where rayfuse runs as root or in a part
    of the tree that systemd has delegated to the user.

    Args:
        own: The content of /proc/self/cgroup.
        root: Where cgroups are mounted.

    Returns:
        None without cgroup v2, or if none may be changed.
    """
    name = next((line[3:] for line in own.splitlines() if line.startswith("0::/")), None)
    if name is None or ".." in name.split("/"):
        return None
    start = root / name.lstrip("/")
    for folder in (start, *start.parents):
        if not folder.is_relative_to(root):
            return None
        control = folder / "cgroup.subtree_control"
        if (
            control.is_file()
            and {"memory", "pids"} <= set(control.read_text().split())
            and os.access(folder, os.W_OK)
            and os.access(folder / "cgroup.procs", os.W_OK)
        ):
            return folder
    return None


@contextmanager
def limited_cgroup(parent: Path | None, memory_bytes: int, processes: int) -> Iterator[str]:
    """Yield the path of a new cgroup with limits, which is removed at the end; "" without a parent.

    Args:
        parent: The result of `find_cgroup_parent`.
        memory_bytes: Limit of all its processes together, files in memory included.
        processes: Limit of its processes and threads.
    """
    if parent is None:
        yield ""
        return
    folder = parent / f"rayfuse-{uuid4().hex}"
    folder.mkdir()
    try:
        (folder / "memory.max").write_text(str(memory_bytes))
        (folder / "pids.max").write_text(str(processes))
        swap = folder / "memory.swap.max"
        if swap.exists():
            swap.write_text("0")
        yield str(folder)
    finally:
        _remove_cgroup(folder)


def _remove_cgroup(folder: Path) -> None:
    """Remove a cgroup as soon as the kernel has reaped its last process."""
    for _ in range(50):
        try:
            folder.rmdir()
        except OSError:
            time.sleep(0.02)
        else:
            return
