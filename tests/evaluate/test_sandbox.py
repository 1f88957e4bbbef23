"""What a model writes can be run, and can do nothing but end."""

import os
from pathlib import Path

import pytest

from rayfuse.evaluate import sandbox
from rayfuse.evaluate.sandbox import Outcome, check_sandbox, python, run_sandboxed


@pytest.fixture(autouse=True)
def can_shut_in() -> None:
    try:
        check_sandbox()
    except ValueError as error:
        pytest.skip(str(error))


def run(code: str, seconds: int = 10) -> Outcome:
    return run_sandboxed({"main.py": code}, [python(), "main.py"], seconds=seconds)


def test_a_program_that_ends_well_passes_and_one_that_fails_does_not():
    assert run("open('own', 'w').write('x'); print(open('own').read())") == Outcome(True, "x\n")
    assert not run("assert 1 == 2").passed
    assert not run("import sys; sys.exit(3)").passed


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("open('/usr/mark', 'w')", "Read-only file system"),
        ("import socket; socket.create_connection(('127.0.0.1', 22), 2)", "unreachable|refused"),
        ("x = bytearray(10**10)", "MemoryError"),
        ("open('big', 'wb').write(bytes(2 * 10**8))", "File too large|No space"),
        ("import os; os.kill(0, 9)", ""),  # all of its process group
        (
            "import subprocess as s; s.run('mount -o remount,rw,bind /usr'.split(), check=True)",
            "returned non-zero",
        ),
        ("import os; os.setuid(1)", "not permitted|Invalid argument"),
    ],
)
def test_what_would_do_harm_fails(code: str, reason: str):
    outcome = run(code)
    assert any(word in outcome.output for word in reason.split("|"))
    assert not outcome.passed
    assert not os.path.exists("/usr/mark")


def test_files_and_processes_outside_are_not_seen(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    assert "No such file" in run(f"open({str(secret)!r})").output
    seen = run("import os; print([name for name in os.listdir('/proc') if name.isdigit()])")
    assert seen.output == "['1']\n"
    assert "SECRET" not in run("import os; print(dict(os.environ))").output
    capabilities = run("print(open('/proc/self/status').read().split('CapEff:')[1].split()[0])")
    assert int(capabilities.output, 16) == 0


def test_a_program_that_does_not_end_is_ended_with_all_it_started():
    outcome = run("import os, time\nos.fork()\ntime.sleep(60)", seconds=1)
    assert not outcome.passed
    assert outcome.output.endswith("killed after 3 s")


def test_a_machine_that_cannot_shut_in_is_told(monkeypatch: pytest.MonkeyPatch):
    check_sandbox.cache_clear()
    monkeypatch.setattr(sandbox, "run_sandboxed", lambda *args, **more: Outcome(False, "no user"))
    with pytest.raises(ValueError, match=r"cannot be shut in here .* remove the tasks.*: no user"):
        check_sandbox()
    check_sandbox.cache_clear()
