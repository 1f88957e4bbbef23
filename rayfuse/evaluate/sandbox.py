"""Programs that models wrote, run where they can do no harm: Linux namespaces by `unshare`.

A program sees the system's programs and libraries, read-only, an empty folder of its own in memory,
and nothing else: no home, no data, no network, no other process. It holds no capability with which
it could change that, and its time, memory, files and processes are bounded.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

MEMORY_BYTES = 4 * 2**30
FILE_BYTES = 64 * 2**20
PROCESSES = 256

CLOCK_OVER_PROCESSOR = 3
"""Seconds by the clock for each of processor time: a busy machine takes them from a program."""

PATH = "/usr/local/bin:/usr/bin:/bin"
"""Where programs are found in the sandbox."""

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


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    passed: bool
    """It ended by itself, without an error."""
    output: str
    """The end of what it printed."""


@lru_cache(maxsize=1)
def check_sandbox() -> None:
    """Check that programs can be shut in on this machine.

    Raises:
        ValueError: They cannot; the message says why.
    """
    try:
        outcome = run_sandboxed({"main.py": "print(6 * 7)"}, [python(), "main.py"], seconds=30)
    except OSError as error:
        raise ValueError(f"{REFUSAL}: {error}") from error
    if outcome.output.strip() != "42":
        raise ValueError(f"{REFUSAL}: {outcome.output.strip()[-200:]}")


REFUSAL = (
    "evaluate.run_generated_code is true, but programs cannot be shut in here (Linux with unshare, "
    "setpriv, prlimit and user namespaces is needed); set it to false and remove the tasks that "
    "run code"
)


def python() -> str:
    """Return this Python, as a program in the sandbox finds it."""
    return str(Path(sys.base_prefix) / "bin" / "python3")


def run_sandboxed(files: dict[str, str], command: list[str], *, seconds: int) -> Outcome:
    """Return what became of a command, run beside some files in a sandbox of its own.

    Args:
        files: Text by name or relative path.
        command: The program and its arguments.
        seconds: Of processor time, for each process; after `CLOCK_OVER_PROCESSOR` times as many by
            the clock the command is killed with all that it started.
    """
    with tempfile.TemporaryDirectory(prefix="rayfuse-sandbox-") as folder:
        root, program = Path(folder, "root"), Path(folder, "work")
        root.mkdir()
        program.mkdir()
        for name, text in files.items():
            path = program / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", errors="replace")
        limits = [
            f"--cpu={seconds}",
            f"--as={MEMORY_BYTES}",
            f"--fsize={FILE_BYTES}",
            f"--nproc={PROCESSES}",
            "--core=0",
        ]
        spaces = ["--user", "--map-root-user", "--mount", "--net", "--ipc", "--uts", "--pid"]
        shut_in = ["unshare", *spaces, "--fork", "--kill-child", "--mount-proc"]
        arguments = [str(root), str(program), PATH, sys.base_prefix]
        script = ["sh", "-c", ROOT_SCRIPT, "sandbox", *arguments]
        try:
            done = subprocess.run(
                [*shut_in, *script, "prlimit", *limits, "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=CLOCK_OVER_PROCESSOR * seconds,
                check=False,
                start_new_session=True,  # a signal to its process group ends at the sandbox
            )
        except subprocess.TimeoutExpired as error:
            return Outcome(
                False,
                _end_of(error.stdout or b"") + f"\nkilled after {CLOCK_OVER_PROCESSOR * seconds} s",
            )
    return Outcome(done.returncode == 0, _end_of(done.stdout))


def _end_of(output: bytes) -> str:
    return output[-2000:].decode(errors="replace")
