"""Tasks that run what models write: HumanEval in Python, MultiPL-E in C++, Java and JavaScript.

Programs run in rayfuse's sandbox alone, and only where the recipe says
`evaluate.run_generated_code: true`.
"""

import json
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from rayfuse.evaluate.sandbox import PATH, check_sandbox, python, run_sandboxed

SECONDS = 20
"""Of processor time, for compiling a program and again for running it."""

PAIR = """package org.javatuples;
import java.util.Objects;
public final class Pair<A, B> {
    private final A first;
    private final B second;
    public Pair(A first, B second) { this.first = first; this.second = second; }
    public static <A, B> Pair<A, B> with(A first, B second) { return new Pair<>(first, second); }
    public A getValue0() { return first; }
    public B getValue1() { return second; }
    @Override public int hashCode() { return Objects.hash(first, second); }
    @Override public boolean equals(Object other) {
        if (!(other instanceof Pair)) return false;
        Pair<?, ?> pair = (Pair<?, ?>) other;
        return Objects.equals(first, pair.first) && Objects.equals(second, pair.second);
    }
}
"""
"""All that MultiPL-E's Java asks of the library javatuples: made here, so that none is needed."""


class Program(NamedTuple):
    """How a language is run."""

    file: str
    tool: str
    """What must be installed."""
    command: str
    """The shell's."""
    ending: str
    """What the tests end with, whitespace aside; the proof is printed before it."""
    print_proof: str
    """The statement that prints the proof, a line of its own."""
    beside: Mapping[str, str] = {}
    """Files beside the program: text by relative path."""


PROGRAMS = {
    "cpp": Program(
        "main.cpp",
        "g++",
        "g++ -std=c++17 -w main.cpp -o main && rm main.cpp && ./main",
        ending="}",
        print_proof=r'std::printf("\nPROOF\n");',
    ),
    "java": Program(
        "Problem.java",
        "javac",
        # The sandbox bounds addresses: a Java machine would reserve more than it uses.
        "export JAVA_TOOL_OPTIONS='-Xmx1g -XX:CompressedClassSpaceSize=64m'; "
        "javac -nowarn Problem.java && rm Problem.java && java -ea Problem",
        ending="}}",
        print_proof=r'System.out.println("\nPROOF");',
        beside={"org/javatuples/Pair.java": PAIR},
    ),
    "js": Program(
        "main.js",
        "node",
        "node main.js",
        ending="",
        print_proof=r'require("fs").writeSync(1, "\nPROOF\n");',
    ),
}

JUDGE = Path(__file__).with_name("judge.py")
"""Runs the test of a Python function in another process than the function."""


def load_multipl_e(data: str, language: str, **_: object) -> dict[str, Dataset]:
    """Return MultiPL-E's HumanEval in a language.

    Raises:
        ValueError: What runs the language is not installed.
    """
    tool = PROGRAMS[language].tool
    if shutil.which(tool, path=PATH) is None:
        others = ", ".join(f"local_multipl_e_{each}" for each in PROGRAMS if each != language)
        raise ValueError(
            f"{tool} is not in {PATH}; install it there, or name {others} without this language"
        )
    path = Path(data).expanduser() / "multipl_e" / f"humaneval-{language}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows, 1):
        add_proof(row["tests"], PROGRAMS[language], f"{path}, line {number}", proof="")
    kept = ("name", "language", "prompt", "tests")
    return {"test": Dataset.from_list([{name: row[name] for name in kept} for row in rows])}


def add_proof(tests: str, program: Program, place: str, *, proof: str) -> str:
    """Return the tests with a statement behind the last one that prints the proof.

    Raises:
        ValueError: The tests do not end as they should.
    """
    end = len(tests.rstrip())
    for closing in reversed(program.ending):
        end = tests.rfind(closing, 0, end)
        if end < 0 or tests[end + 1 :].strip(" \n" + program.ending):
            raise ValueError(f"{place}: the tests do not end with {program.ending!r}")
    return f"{tests[:end]}\n{program.print_proof.replace('PROOF', proof)}\n{tests[end:]}"


def pass_python(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return whether a function passes HumanEval's test of it, all to the end."""
    check_sandbox()
    proof = secrets.token_hex(16)
    # The prompt ends with a function without its body; its other functions are the test's helpers.
    test = f"{doc['prompt']}    pass\n{doc['test']}"
    files = {
        "judge.py": JUDGE.read_text(),
        "candidate.py": f"{doc['prompt']}{results[0]}\n",
        "tests.json": json.dumps({"test": test, "name": doc["entry_point"], "proof": proof}),
    }
    outcome = run_sandboxed(files, [python(), "judge.py"], seconds=SECONDS, proof=proof)
    return {"pass_at_1": float(outcome.passed)}


def pass_program(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return whether a program runs MultiPL-E's tests behind it to the end without an error."""
    check_sandbox()
    program, proof = PROGRAMS[doc["language"]], secrets.token_hex(16)
    tests = add_proof(doc["tests"], program, doc["name"], proof=proof)
    files = {program.file: f"{doc['prompt']}{results[0]}\n{tests}\n", **program.beside}
    command = ["sh", "-c", program.command]
    outcome = run_sandboxed(files, command, seconds=SECONDS, proof=proof)
    return {"pass_at_1": float(outcome.passed)}
