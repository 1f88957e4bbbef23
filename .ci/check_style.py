"""Check the house rules that no linter knows: words, length of files and functions, late imports.

python .ci/check_style.py [PATH ...]        the words and limits of [tool.house] in pyproject.toml
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

RULES = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["house"]
WORDS = [(re.compile(rf"\b(?:{word})\b", re.I), use) for word, use in RULES["words"].items()]
ALLOWED = [re.compile(phrase, re.I) for phrase in RULES["allowed"]]


def find_words(path: Path) -> Iterator[str]:
    """Yield the banned words of a file, each with the standard term."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for phrase in ALLOWED:
            line = phrase.sub(lambda match: "_" * len(match[0]), line)  # noqa: PLW2901
        for word, use in WORDS:
            for match in word.finditer(line):
                yield f"{path}:{number}: {match[0]!r}: use {use}"


def find_long(path: Path) -> Iterator[str]:
    """Yield long files and functions; docstrings, comments and empty lines do not count."""
    text = path.read_text()
    if (lines := len(text.splitlines())) > RULES["max_file_lines"]:
        yield f"{path}: {lines} lines, more than {RULES['max_file_lines']}"
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            code |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            own = set(range(node.lineno, (node.end_lineno or 0) + 1)) - _docstring_lines(node)
            if (lines := len(own & code)) > RULES["max_function_lines"]:
                yield f"{path}:{node.lineno}: {node.name} has {lines} lines of code"


def _docstring_lines(node: ast.FunctionDef) -> set[int]:
    first: Any = node.body[0]
    has_docstring = ast.get_docstring(node) is not None
    return set(range(first.lineno, first.end_lineno + 1)) if has_docstring else set()


def count_late_imports(paths: list[Path]) -> int:
    """Count the imports inside functions."""
    imports: set[tuple[Path, int]] = set()
    for path in paths:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                found = [
                    n for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)
                ]
                imports |= {(path, node.lineno) for node in found}
    return len(imports)


def main(given: list[str]) -> int:
    """Print every violation, and fail if there is any."""
    names = subprocess.check_output(["git", "ls-files", *(given or RULES["paths"])], text=True)
    paths = [Path(name) for name in names.split() if Path(name).exists()]
    code = [path for path in paths if path.suffix == ".py"]
    prose = [path for path in paths if path.suffix in (".py", ".md", ".yaml", ".sh")]
    faults = [fault for path in prose for fault in find_words(path)]
    faults += [fault for path in code for fault in find_long(path)]
    late = count_late_imports([path for path in code if path.parts[0] == "rayfuse"])
    if late > RULES["max_late_imports"]:
        faults.append(f"{late} imports inside functions, more than {RULES['max_late_imports']}")
    print(*faults, sep="\n")
    print(f"{len(paths)} files, {len(faults)} faults, {late} imports inside functions")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
