"""Model-written programs run isolated from files, network and other processes."""

import os
from pathlib import Path

import pytest

from rayfuse.evaluate import sandbox
from rayfuse.evaluate.sandbox import Outcome, check_sandbox, python, run_sandboxed


@pytest.fixture(autouse=True)
def needs_sandbox() -> None:
    try:
        check_sandbox()
    except ValueError as error:
        pytest.skip(str(error))


def run(code: str, seconds: int = 10) -> Outcome:
    return run_sandboxed({"main.py": code}, [python(), "main.py"], seconds=seconds)


def test_a_program_passes_if_and_only_if_it_exits_with_0():
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
def test_a_harmful_program_fails(code: str, reason: str):
    outcome = run(code)
    assert any(word in outcome.output for word in reason.split("|"))
    assert not outcome.passed
    assert not os.path.exists("/usr/mark")


def test_files_and_processes_outside_are_invisible(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    assert "No such file" in run(f"open({str(secret)!r})").output
    seen = run("import os; print([name for name in os.listdir('/proc') if name.isdigit()])")
    assert seen.output == "['1']\n"
    assert "SECRET" not in run("import os; print(dict(os.environ))").output
    capabilities = run("print(open('/proc/self/status').read().split('CapEff:')[1].split()[0])")
    assert int(capabilities.output, 16) == 0


def test_a_program_that_does_not_end_is_killed_with_its_children():
    outcome = run("import os, time\nos.fork()\ntime.sleep(60)", seconds=1)
    assert not outcome.passed
    assert outcome.output.endswith("killed after 3 s")


def test_a_machine_without_namespaces_is_refused(monkeypatch: pytest.MonkeyPatch):
    check_sandbox.cache_clear()
    monkeypatch.setattr(sandbox, "run_sandboxed", lambda *args, **more: Outcome(False, "no user"))
    with pytest.raises(ValueError, match=r"cannot sandbox programs .* remove the tasks.*: no user"):
        check_sandbox()
    check_sandbox.cache_clear()
