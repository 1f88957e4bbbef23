"""Model-written programs run isolated from files, network and other processes."""

import gzip
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from rayfuse.evaluate import sandbox
from rayfuse.evaluate.bounded_process import (
    Limits,
    find_cgroup_parent,
    limited_cgroup,
    measure_tree_bytes,
    run_bounded,
)
from rayfuse.evaluate.sandbox import Outcome, check_sandbox, python, run_sandboxed
from tests.cluster.checks import ROOT


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
    assert outcome.output.endswith("killed: more than 3 s")


@pytest.mark.parametrize(
    "path",
    ["sys/kernel/core_pattern", "sysrq-trigger", "sys/vm/overcommit_memory", "self/oom_score_adj"],
)
def test_no_setting_of_the_kernel_can_be_written(path: str):
    before = Path("/proc", path).read_bytes() if "sysrq" not in path else b""
    outcome = run(f"open('/proc/{path}', 'r+b', 0).write(b'|/bin/false')")
    assert "Read-only file system" in outcome.output or "No such file" in outcome.output
    assert not outcome.passed
    assert "sysrq" in path or Path("/proc", path).read_bytes() == before


def test_the_program_is_nobody_on_the_node_even_if_rayfuse_runs_as_root():
    outside = run("print(open('/proc/self/uid_map').read().split()[1])").output.strip()
    assert outside == str(os.geteuid() or sandbox.UNPRIVILEGED)


@pytest.mark.parametrize(
    "call",
    [
        "libc.unshare(0x10000000)",  # a user namespace, with every capability in it
        "libc.ptrace(0, 0, 0, 0)",
        "libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)",
        "libc.syscall(425, 1, 0)",  # io_uring_setup
    ],
)
def test_calls_into_the_kernel_that_no_test_needs_are_refused(call: str):
    code = "import ctypes; libc = ctypes.CDLL(None, use_errno=True); "
    assert run(f"{code}print({call}, ctypes.get_errno())").output == "-1 1\n"


def test_signals_have_their_defaults():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        check_signals()
    finally:
        signal.signal(signal.SIGHUP, former)


def check_signals() -> None:
    ignored = run("print(open('/proc/self/status').read().split('SigIgn:')[1].split()[0])")
    mine = 0x0000000001001000  # SIGPIPE and SIGXFSZ, by the interpreter that prints
    of_libc = 3 << 31  # signals 32 and 33, which the C library keeps to itself
    assert int(ignored.output, 16) & ~of_libc == mine
    assert run_sandboxed({}, ["sh", "-c", "kill -PIPE $$; sleep 1"], seconds=5).passed


def test_the_sandbox_needs_no_administrators_folders_in_the_path(monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert run("print(1)").passed


LIMITS = Limits(seconds=20, memory_bytes=2**28, output_bytes=2**20)


def test_output_is_bounded():
    outcome = run("while True: print('x' * 10**6)")
    assert outcome.output.endswith("killed: more than 1,048,576 bytes of output")
    assert len(outcome.output) < 3000
    assert not outcome.passed


@pytest.mark.parametrize(
    ("code", "exceeded"),
    [
        (
            "import os, time\nfor _ in range(9): os.fork() or (bytearray(10**8), time.sleep(30))"
            "\ntime.sleep(30)",
            "more than 268,435,456 bytes of memory",
        ),
        ("import os, time; os.close(1); os.close(2); time.sleep(60)", "more than 2 s"),
    ],
)
def test_a_tree_of_processes_is_killed_at_its_limits(code: str, exceeded: str):
    limits = LIMITS if "memory" in exceeded else Limits(2, 2**28, 2**20)
    code = code.replace("bytearray(10**8)", "globals().update(x=bytearray(b'x') * 10**8)")
    command = ["unshare", "--user", "--pid", "--fork", "--kill-child"]
    ended = run_bounded([*command, sys.executable, "-c", code], sandbox.TOOL_PATH, limits)
    assert ended.exceeded == exceeded
    assert ended.exit_code == -9


def test_a_program_starts_no_more_processes_than_allowed():
    code = """
import os, time
started = 0
try:
    for _ in range(600):
        if not os.fork():
            time.sleep(30)
            os._exit(0)
        started += 1
except OSError:
    pass
print(started, flush=True)
os._exit(0)
"""
    found = run(code)
    assert 0 < int(found.output.split()[0]) < sandbox.MAX_PROCESSES


def test_the_memory_of_a_process_that_has_ended_is_0():
    assert measure_tree_bytes(os.getpid()) > 0
    assert measure_tree_bytes(2**22 + 1) == 0


def write_cgroup(folder: Path, controllers: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cgroup.subtree_control").write_text(controllers)
    (folder / "cgroup.procs").write_text("")
    return folder


def test_a_sandbox_gets_a_cgroup_where_one_may_be_made(tmp_path: Path):
    user = write_cgroup(tmp_path / "user.slice" / "user@7", "cpu memory pids")
    write_cgroup(user / "app", "")
    own = "1:name=x:/other\n0::/user.slice/user@7/app\n"
    assert find_cgroup_parent(own, tmp_path) == user
    assert find_cgroup_parent("1:memory:/\n", tmp_path) is None
    assert find_cgroup_parent("0::/../../x\n", tmp_path) is None
    write_cgroup(user, "cpu")
    assert find_cgroup_parent(own, tmp_path) is None
    with limited_cgroup(user, 1000, 10) as name:
        assert Path(name).parent == user
        assert Path(name, "memory.max").read_text() == "1000"
        assert Path(name, "pids.max").read_text() == "10"
        for file in Path(name).iterdir():
            file.unlink()  # the kernel's files vanish with their folder
    assert not Path(name).exists()
    with limited_cgroup(None, 1000, 10) as name:
        assert name == ""


def load_code_tasks():
    spec = importlib.util.spec_from_file_location("code_tasks", ROOT / "recipes/tasks/code.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ENDS_EARLY = {
    "python": ("def f():\n", "    __import__('sys').exit()", "    __import__('os')._exit(0)"),
    "cpp": (
        "#include<assert.h>\n#include<bits/stdc++.h>\nlong f() {\n",
        "    std::exit(0);",
        "    std::_Exit(0);",
    ),
    "java": (
        "class Problem {\n    public static long f() {\n",
        "    System.exit(0); return 0;",
        "    Runtime.getRuntime().halt(0); return 0;",
    ),
    "js": ("function f() {\n", "  process.exit(0);\n}", "  process.reallyExit(0);\n}"),
}
RIGHT = {
    "python": "    return 1",
    "cpp": "    return 1;",
    "java": "    return 1;",
    "js": "  return 1;\n}",
}
TESTS = {
    "python": "def check(candidate):\n    assert candidate() == 1\n",
    "cpp": "}\nint main() {\n    auto candidate = f;\n    assert(candidate() == 1);\n}\n",
    "java": "    }\n    public static void main(String[] args) {\n"
    "    assert(f() == 1);\n    }\n\n}\n",
    "js": "const assert = require('node:assert');\n\nfunction test() {\n"
    "  assert.deepEqual(f(), 1);\n}\n\ntest();",
}


@pytest.mark.parametrize("language", TESTS)
def test_a_program_passes_only_if_it_runs_its_tests_to_the_end(language: str):
    code = load_code_tasks()
    prompt, *early = ENDS_EARLY[language]

    def score(answer: str) -> float:
        if language == "python":
            doc = {"prompt": prompt, "test": TESTS[language], "entry_point": "f"}
            return code.pass_python(doc, [answer])["pass_at_1"]
        doc = {"prompt": prompt, "tests": TESTS[language], "language": language, "name": "f"}
        return code.pass_program(doc, [answer])["pass_at_1"]

    assert score(RIGHT[language]) == 1
    assert [score(answer) for answer in early] == [0, 0]
    assert score(RIGHT[language].replace("1", "2")) == 0


UNREACHABLE = {
    "its memory": "open(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
    "its descriptors": "open(f'/proc/{os.getppid()}/fd/1', 'w')",
    "its environment": "open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "the test": "open('/work/tests.json').read()",
}


@pytest.mark.parametrize("place", UNREACHABLE)
def test_a_function_cannot_reach_the_process_that_judges_it(place: str):
    code = load_code_tasks()
    doc = {"prompt": "def f():\n", "test": TESTS["python"], "entry_point": "f"}
    reach = f"    import os\n    try:\n        {UNREACHABLE[place]}\n"
    refused = "    except OSError:\n        return 1\n    return 2\n"
    assert code.pass_python(doc, [reach + refused])["pass_at_1"] == 1
    assert code.pass_python(doc, ["    open('/work/judge.py').read()\n    return 1\n"])["pass_at_1"]


def test_a_function_that_prints_or_answers_anything_has_not_passed():
    code = load_code_tasks()
    doc = {"prompt": "def f():\n", "test": TESTS["python"], "entry_point": "f"}
    answers = [
        "    class Same:\n        __eq__ = lambda *_: True\n    return Same()\n",
        "    import os\n    for fd in range(20):\n        try:\n"
        "            os.write(fd, b'passed\\n')\n        except OSError:\n"
        "            pass\n    return 2\n",
        "    import os, signal\n    os.kill(os.getppid(), signal.SIGTERM)\n",
        "    raise SystemExit\n",
    ]
    passed = [code.pass_python(doc, [answer])["pass_at_1"] for answer in answers]
    assert passed == [0] * len(answers)


def test_arguments_and_results_of_every_kind_cross_unchanged():
    code = load_code_tasks()
    values = (
        "[None, True, 1, -2.5, float('inf'), 'a\\n\u00e9', (1, [2]), {3}, {(1,): {'x': 2}}, 10**40]"
    )
    test = f"def check(candidate):\n    values = {values}\n"
    test += "    assert candidate(*values) == values\n    assert type(candidate(True)[0]) is bool\n"
    test += "    try:\n        candidate()\n    except ZeroDivisionError:\n        return\n"
    doc = {"prompt": "def f(*x):\n", "test": test + "    assert False\n", "entry_point": "f"}
    assert code.pass_python(doc, ["    x or 1 / 0\n    return list(x)\n"])["pass_at_1"] == 1
    assert code.pass_python(doc, ["    x or [][0]\n    return list(x)\n"])["pass_at_1"] == 0
    assert code.pass_python(doc, ["    x or 1 / 0\n    return iter(x)\n"])["pass_at_1"] == 0


@pytest.mark.slow
def test_every_solution_of_humaneval_passes_and_none_is_passed_by_nothing(shared_data):
    code = load_code_tasks()
    with gzip.open(shared_data / "eval/humaneval/HumanEval.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    for row in rows if os.environ.get("RAYFUSE_LONG_CHAOS") else [*rows[::20], rows[33]]:
        solutions = [row["canonical_solution"], "    return None\n"]
        passed = [code.pass_python(row, [answer])["pass_at_1"] for answer in solutions]
        assert passed == [1, 0], row["task_id"]


def test_tests_of_another_form_are_refused():
    code = load_code_tasks()
    with pytest.raises(ValueError, match=r"x.jsonl, line 3: the tests do not end with '}}'"):
        code.add_proof("assert(f() == 1);\n}\n", code.PROGRAMS["java"], "x.jsonl, line 3", proof="")


def test_a_machine_without_namespaces_is_refused(monkeypatch: pytest.MonkeyPatch):
    check_sandbox.cache_clear()
    monkeypatch.setattr(sandbox, "run_sandboxed", lambda *args, **more: Outcome(False, "no user"))
    with pytest.raises(ValueError, match=r"cannot sandbox programs .* remove the tasks.*: no user"):
        check_sandbox()
    check_sandbox.cache_clear()
