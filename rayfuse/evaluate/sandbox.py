"""Run model-written programs where they can do no harm: in Linux namespaces made by `unshare`.

A program sees the system's programs and libraries (read-only), an empty folder of its own in
memory, and nothing else: no home, no data, no network, no other process. It holds no capability
that could change this. Its CPU time, memory, file size and number of processes are limited.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from rayfuse.config.base import UserError

MAX_MEMORY_BYTES = 4 * 2**30
MAX_FILE_BYTES = 64 * 2**20
MAX_PROCESSES = 256

WALL_SECONDS_PER_CPU_SECOND = 3
"""Wall-clock limit as a multiple of the CPU limit: on a busy node a program waits for a core."""

PATH = "/usr/local/bin:/usr/bin:/bin"
"""Where the sandbox looks for programs."""

# Each mount is in a namespace of its own, so it vanishes with the sandbox. A bind mount takes its
# read-only flag only from a second, remounting call. `chroot` comes last: setpriv then drops all
# capabilities, without which no mount can be undone.
ROOT_SCRIPT = r"""
set -e
root=$1; program=$2; path=$3; shift 3
mount -t tmpfs -o size=512m,mode=755 none "$root"
for part in /usr /bin /sbin /lib /lib32 /lib64 /etc/alternatives /etc/java-* "$1"; do
    [ -e "$part" ] || continue
    mkdir -p "$root$(dirname "$part")"
    if [ -L "$part" ]; then cp -P "$part" "$root$part"; continue; fi
    [ -e "$root$part" ] && continue
    mkdir -p "$root$part"
    mount --bind "$part" "$root$part"
    mount -o remount,bind,ro,nosuid,nodev "$root$part"
done
shift
mkdir -p "$root/proc" "$root/tmp" "$root/dev"
mount -t proc proc "$root/proc"
for device in null zero urandom; do
    touch "$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"
done
cp -r "$program" "$root/work"
exec chroot "$root" /usr/bin/env -i -C /work PATH="$path" HOME=/tmp \
    LANG=C.UTF-8 setpriv --no-new-privs --bounding-set=-all --inh-caps=-all -- "$@"
"""

REFUSAL = (
    "evaluate.run_generated_code is true, but this machine cannot sandbox programs (Linux with "
    "unshare, setpriv, prlimit and user namespaces is needed); set it to false and remove the "
    "tasks that run code"
)


@dataclass(frozen=True)
class Outcome:
    """The result of a program."""

    passed: bool
    """It exited by itself with code 0."""
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


def run_sandboxed(files: dict[str, str], command: list[str], *, seconds: int) -> Outcome:
    """Run a command beside some files, in a sandbox of its own.

    Args:
        files: Text by name or relative path.
        command: The program and its arguments.
        seconds: CPU time limit of each process. After `WALL_SECONDS_PER_CPU_SECOND` times as long
            the command is killed with all processes that it started.
    """
    with tempfile.TemporaryDirectory(prefix="rayfuse-sandbox-") as folder:
        root, program = Path(folder, "root"), Path(folder, "work")
        root.mkdir()
        program.mkdir()
        for name, text in files.items():
            path = program / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", errors="replace")
        wall_seconds = WALL_SECONDS_PER_CPU_SECOND * seconds
        try:
            done = subprocess.run(
                _build_command(root, program, command, seconds),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=wall_seconds,
                check=False,
                start_new_session=True,  # a signal to its process group stays in the sandbox
            )
        except subprocess.TimeoutExpired as error:
            output = _end_of(error.stdout or b"")
            return Outcome(False, f"{output}\nkilled after {wall_seconds} s")
    return Outcome(done.returncode == 0, _end_of(done.stdout))


def _build_command(root: Path, program: Path, command: list[str], seconds: int) -> list[str]:
    limits = [
        f"--cpu={seconds}",
        f"--as={MAX_MEMORY_BYTES}",
        f"--fsize={MAX_FILE_BYTES}",
        f"--nproc={MAX_PROCESSES}",
        "--core=0",
    ]
    namespaces = ["--user", "--map-root-user", "--mount", "--net", "--ipc", "--uts", "--pid"]
    # --kill-child: process 1 of the namespace dies with unshare, and all others die with it.
    unshare = ["unshare", *namespaces, "--fork", "--kill-child", "--mount-proc"]
    arguments = [str(root), str(program), PATH, sys.base_prefix]
    script = ["sh", "-c", ROOT_SCRIPT, "sandbox", *arguments]
    return [*unshare, *script, "prlimit", *limits, "--", *command]


def _end_of(output: bytes) -> str:
    return output[-2000:].decode(errors="replace")
