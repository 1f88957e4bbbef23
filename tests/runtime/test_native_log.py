"""What compiled libraries print is in a file, and how they end a process is on the terminal."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

OPEN = """
import os, pathlib, signal, sys
from rayfuse.runtime.native_log import NATIVE_LOG
NATIVE_LOG.open(pathlib.Path(sys.argv[1]))
os.write(2, b"E1203 core_worker.cc:12: Failed to connect to GCS\\n")
"""


def run_program(ending: str, folder: Path) -> tuple[int, str, str]:
    """Run a program that prints as a library does; return its code, stderr and log."""
    command = [sys.executable, "-c", f"{OPEN}{ending}", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    (log,) = (folder / "logs").iterdir()
    return done.returncode, done.stderr, log.read_text()


@pytest.mark.parametrize(
    ("ending", "number", "shown"),
    [
        ("os.abort()", signal.SIGABRT, "Fatal Python error: Aborted"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", signal.SIGSEGV, "Segmentation fault"),
    ],
)
def test_a_fatal_error_of_a_library_is_shown_with_the_python_stack(
    tmp_path: Path, ending: str, number: int, shown: str
):
    code, errors, log = run_program(ending, tmp_path)
    assert code == -number
    assert shown in errors
    assert 'File "<string>", line' in errors
    assert log == "E1203 core_worker.cc:12: Failed to connect to GCS\n"


def test_the_end_of_a_command_names_the_file(tmp_path: Path):
    code, errors, log = run_program("NATIVE_LOG.report()", tmp_path)
    assert code == 0
    assert errors.startswith(f"rayfuse: messages of libraries are in {tmp_path}")
    assert log


REDIRECT = """
import os, pathlib, sys
from rayfuse.runtime.native_log import NATIVE_LOG
folder = pathlib.Path(sys.argv[1])
with NATIVE_LOG.redirect(folder):
    pass
print(len(list((folder / "logs").iterdir())))
for text in (b"first\\n", b"second\\n"):
    with NATIVE_LOG.redirect(folder):
        os.write(2, text)
os.write(2, b"after\\n")
"""


def test_a_redirection_ends_and_leaves_no_empty_file(tmp_path: Path):
    command = [sys.executable, "-c", REDIRECT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "0\n"
    assert done.stderr == "after\n"
    (log,) = (tmp_path / "logs").iterdir()
    assert log.read_text() == "first\nsecond\n"
