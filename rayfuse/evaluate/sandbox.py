"""Run model-written programs where they can do no harm: in Linux namespaces made by `unshare`.

A program sees the system's programs and libraries (read-only), an empty folder of its own in
memory, its own processes, and nothing else: no home, no data, no network, no setting of the kernel.
It holds no capability that could change this, and never runs as root of the node: root drops to
an unprivileged user first. CPU time, file size, processes and output are limited, and memory both
for each process and for all together.
"""

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from rayfuse.config.base import UserError
from rayfuse.evaluate import syscall_filter
from rayfuse.evaluate.bounded_process import (
    Limits,
    find_cgroup_parent,
    limited_cgroup,
    run_bounded,
)
from rayfuse.runtime.scratch import scratch_folder

MAX_MEMORY_BYTES = 4 * 2**30
"""Of each process by its limit on addresses, and of all together."""
MAX_FILE_BYTES = 64 * 2**20
MAX_PROCESSES = 256
MAX_OUTPUT_BYTES = 2**20
"""A program that prints more is killed: its output is kept in the memory of this process."""

WALL_SECONDS_PER_CPU_SECOND = 3
"""Wall-clock limit as a multiple of the CPU limit: on a busy node a program waits for a core."""

PATH = "/usr/local/bin:/usr/bin:/bin"
"""Where the sandbox looks for programs."""

TOOL_PATH = f"{PATH}:/usr/local/sbin:/usr/sbin:/sbin"
"""Where the tools that make the sandbox are: Debian has chroot in a folder for administrators."""

UNPRIVILEGED = 65534
"""User and group that root drops to; they own no files."""

# As root of the node, in a mount namespace of its own. Python may be in root's home, which no other
# user can enter, so it gets a second place.
ROOT_PRELUDE = r"""
set -e
from=$1; to=$2; shift 2
mkdir -p "$to"
mount --bind "$from" "$to"
exec "$@"
"""

# Each mount is in a namespace of its own, so it vanishes with the sandbox. A bind mount takes its
# read-only flag only from a second, remounting call. Without subset=pid, /proc would have the
# kernel's settings, which ask for the node's root, not for capabilities. `chroot` comes last:
# setpriv then drops all capabilities, without which no mount can be undone.
ROOT_SCRIPT = r"""
set -e
root=$1; program=$2; path=$3; python=$4; python_here=$5; shift 5
mount -t tmpfs -o size=512m,mode=755 none "$root"
bind() {
    mkdir -p "$root$2"
    mount --bind "$1" "$root$2"
    mount -o remount,bind,ro,nosuid,nodev "$root$2"
}
for part in /usr /bin /sbin /lib /lib32 /lib64 /etc/alternatives /etc/java-*; do
    [ -e "$part" ] || continue
    mkdir -p "$root$(dirname "$part")"
    if [ -L "$part" ]; then cp -P "$part" "$root$part"; else bind "$part" "$part"; fi
done
[ -e "$root$python" ] || bind "$python_here" "$python"
mkdir -p "$root/proc" "$root/tmp" "$root/dev"
mount -t proc -o ro,nosuid,nodev,noexec,subset=pid proc "$root/proc"
for device in null zero urandom; do
    touch "$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"
done
cp -r "$program" "$root/work"
mv "$root/work/.filter.py" "$root/filter.py"
exec chroot "$root" /usr/bin/env -i -C /work PATH="$path" HOME=/tmp \
    LANG=C.UTF-8 setpriv --no-new-privs --bounding-set=-all --inh-caps=-all -- "$@"
"""

REFUSAL = (
    "evaluate.run_generated_code is true, but this machine cannot sandbox programs (Linux 5.8 or "
    "later with unshare, setpriv, prlimit and user namespaces is needed, and as root a Python that "
    "all users can read); set it to false and remove the tasks that run code"
)


@dataclass(frozen=True)
class Outcome:
    """The result of a program."""

    passed: bool
    """It exited by itself with code 0, after it printed the proof if one was expected."""
    output: str
    """The end of its output."""


@lru_cache(maxsize=1)
def check_sandbox() -> None:
    """Check that this machine can sandbox programs.

    Raises:
        UserError: It cannot; the message gives the reason.
    """
    try:
        outcome = run_sandboxed({"main.py": "print(6 * 7)"}, [python(), "main.py"], seconds=30)
    except OSError as error:
        raise UserError(f"{REFUSAL}: {error}") from error
    if outcome.output.strip() != "42":
        raise UserError(f"{REFUSAL}: {outcome.output.strip()[-200:]}")


def python() -> str:
    """Locate this Python inside the sandbox."""
    return str(Path(sys.base_prefix) / "bin" / "python3")


def run_sandboxed(
    files: dict[str, str], command: list[str], *, seconds: int, proof: str = ""
) -> Outcome:
    """Run a command beside some files, in a sandbox of its own.

    Args:
        files: Text by name or relative path.
        command: The program and its arguments.
        seconds: CPU time limit of each process. After `WALL_SECONDS_PER_CPU_SECOND` times as long
            the command is killed with all processes that it started.
        proof: A line without which the program has not passed, whatever its exit code: a program
            may end with 0 before its tests. Make it random, and print it after the last test.
    """
    with scratch_folder("sandbox") as folder:
        root, program = folder / "root", folder / "work"
        root.mkdir()
        texts = files | {".filter.py": Path(syscall_filter.__file__).read_text()}
        for name, text in texts.items():
            path = program / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", errors="replace")
        limits = Limits(WALL_SECONDS_PER_CPU_SECOND * seconds, MAX_MEMORY_BYTES, MAX_OUTPUT_BYTES)
        with limited_cgroup(_find_cgroup(), MAX_MEMORY_BYTES, MAX_PROCESSES) as cgroup:
            sandboxed = _build_command(folder, command, seconds, cgroup)
            ended = run_bounded(sandboxed, TOOL_PATH, limits)
    output = ended.output[-2000:].decode(errors="replace")
    if ended.exceeded:
        return Outcome(False, f"{output}\nkilled: {ended.exceeded}")
    is_proven = not proof or proof.encode() in ended.output.split(b"\n")
    return Outcome(ended.exit_code == 0 and is_proven, output)


@lru_cache(maxsize=1)
def _find_cgroup() -> Path | None:
    with suppress(FileNotFoundError):
        return find_cgroup_parent(Path("/proc/self/cgroup").read_text())
    return None


def _build_command(folder: Path, command: list[str], seconds: int, cgroup: str) -> list[str]:
    """Build the command that enters the cgroup, drops root, makes the namespaces and the limits.

    Args:
        folder: Contains `root`, where the sandbox is mounted, and the program in `work`.
        command: The program and its arguments.
        seconds: CPU time limit of each process.
        cgroup: The folder of a cgroup to enter, or "".
    """
    limits = [
        f"--cpu={seconds}",
        f"--as={MAX_MEMORY_BYTES}",
        f"--fsize={MAX_FILE_BYTES}",
        f"--nproc={MAX_PROCESSES}",
        "--core=0",
    ]
    enter = ["sh", "-ec", 'echo $$ > "$0/cgroup.procs"; exec "$@"', cgroup] if cgroup else []
    here, drop = sys.base_prefix, []
    if os.geteuid() == 0:
        here = str(folder / "python")
        for path in (folder, *folder.rglob("*")):
            os.chown(path, UNPRIVILEGED, UNPRIVILEGED)
        to_nobody = [
            f"--reuid={UNPRIVILEGED}",
            f"--regid={UNPRIVILEGED}",
            "--clear-groups",
            "--inh-caps=-all",
        ]
        drop = ["unshare", "--mount", "--propagation=private", "sh", "-c", ROOT_PRELUDE, "sandbox"]
        drop += [sys.base_prefix, here, "setpriv", *to_nobody, "--"]
    namespaces = ["--user", "--map-root-user", "--mount", "--net", "--ipc", "--uts", "--pid"]
    # --kill-child: process 1 of the namespace dies with unshare, and all others die with it.
    unshare = ["unshare", *namespaces, "--fork", "--kill-child"]
    arguments = [str(folder / "root"), str(folder / "work"), PATH, sys.base_prefix, here]
    script = ["sh", "-c", ROOT_SCRIPT, "sandbox", *arguments]
    limited = ["prlimit", *limits, "--", python(), "-I", "-S", "/filter.py", *command]
    return [*enter, *drop, *unshare, *script, *limited]
