"""Every command, path, setting, link and code block of the documentation is true of the code."""

import importlib.util
import os
import re
import shlex
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from docs import api_reference
from docs.recipe_table import PAGE, insert_settings
from docs.site_pages import FENCE, LINK, list_anchors
from rayfuse.capture.engines.load import ENGINES
from rayfuse.cli import app
from rayfuse.config.load import read_values
from rayfuse.config.recipe import Recipe
from rayfuse.runtime.progress import report_nothing
from rayfuse.storage.migrate import migrate_store
from rayfuse.storage.store import LocalStore
from rayfuse.train.divergence import DIVERGENCES
from tests.docs.blocks import ROOT, read_blocks
from tests.small_run import write_recipe

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
OF_A_RUN = ("docs/api.md", "README.md")
"""Pages whose Python blocks run one after the other, in the folder of a recipe."""

CODE = re.compile(r"`([^`\n]+)`")
REPO_PATH = re.compile(
    r"(?:rayfuse|tests|recipes|cluster|benchmarks|docs|\.ci)/[\w./-]*\w/?|[A-Z]+\.md"
)
HERE = re.compile(r"^cat > (?P<file>\S+) <<EOF\n(?P<body>.*?)^EOF$", re.M | re.S)
TEST = re.compile(r"(tests/[\w/]+\.py)(?: -k ([\w]+))?")
PLACEHOLDERS = re.compile(r"[A-Z]{2,}|…|\.\.\.")
MINIMAL = {
    "storage": "s3://bucket/run",
    "corpus": {"documents": "text.jsonl"},
    "target": {"model": "target"},
    "sources": [{"name": "a", "model": "source"}],
}


def find_blocks(*kinds: str) -> list[Any]:
    """List the fenced blocks of some kinds, each named by its page and line."""
    found: list[Any] = []
    for page, name in zip(PAGES, NAMES, strict=True):
        if "python" in kinds and name in (*OF_A_RUN, "docs/other-trainers.md"):
            continue  # the last is run by tests/interop/test_trainers.py
        text = page.read_text()
        for match in FENCE.finditer(text):
            if match["kind"] in kinds:
                line = text.count("\n", 0, match.start()) + 1
                found.append(pytest.param(match["body"], id=f"{name}:{line}"))
    return found


def list_commands() -> list[object]:
    """List the lines of every shell block, joined where they end with a backslash."""
    found: list[object] = []
    for block in find_blocks("sh"):
        body, name = HERE.sub("", block.values[0]), block.id
        for line in body.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                found.append(pytest.param(words, id=f"{name} {' '.join(words)[:40]}"))
    return found


def prose_of(page: Path) -> str:
    """Read a page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def match_names(file: str, part: str) -> bool:
    """Check that pytest's `-k` finds a test in a file."""
    tests = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.M)
    return any(part in name for name in tests)


def split_command(words: list[str]) -> list[str]:
    """Strip variables, `ray job submit` and the path of an interpreter from a command."""
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    if words[:3] == ["ray", "job", "submit"]:
        words = words[words.index("--") + 1 :]
    if Path(words[0]).name == "python" and words[1] == "-m":
        words = words[2:]
    return [Path(words[0]).name, *words[1:]] if words[0].startswith(".venv/") else words


def find_command(name: str) -> Any:
    """Look up a command of rayfuse."""
    group: Any = typer.main.get_command(app)
    return group.get_command(group.make_context("rayfuse", [], resilient_parsing=True), name)


def check_rayfuse(arguments: list[str]) -> None:
    """Parse a rayfuse command, without running it."""
    if ">" in arguments:
        arguments = arguments[: arguments.index(">")]
    name, *rest = arguments
    command = find_command(name)
    assert command is not None, f"rayfuse has no command {name}"
    command.make_context(name, rest)


@pytest.mark.parametrize("words", list_commands())
def test_a_command_of_a_shell_block_exists_with_its_options_and_files(words: list[str]):
    name, *arguments = split_command(words)
    if name == "rayfuse":
        check_rayfuse(arguments)
    elif name == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(arguments) <= set(targets)
    elif name == "python":
        assert (ROOT / arguments[0]).is_file()
    elif name == "pytest":
        assert all((ROOT / word).exists() for word in arguments if word.startswith("tests/"))
    elif "." in name:
        assert importlib.util.find_spec(name) is not None
    else:
        assert name in ("pip", "cd", "export"), f"teach this test to check {name!r}"
    for word in arguments:
        if REPO_PATH.fullmatch(word) and "my." not in word:
            assert (ROOT / word).exists(), word


def find_written_recipes() -> list[object]:
    """List the recipes that shell blocks write."""
    return [
        pytest.param(match["body"], id=f"{block.id} {match['file']}")
        for block in find_blocks("sh")
        for match in HERE.finditer(block.values[0])
    ]


@pytest.mark.parametrize("body", [*find_blocks("yaml"), *find_written_recipes()])
def test_a_yaml_block_is_a_recipe_or_a_part_of_one_or_a_task(body: str):
    values = yaml.safe_load(body.replace("!function", ""))
    if "task" in values:
        assert {"output_type", "doc_to_text", "doc_to_target"} <= set(values)
    else:
        read_values({**MINIMAL, **values}, [])


@pytest.fixture
def registries() -> Iterator[None]:
    """Undo what a block registers."""
    tables: list[dict[str, Any]] = [DIVERGENCES, ENGINES]
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.fixture(scope="module")
def stored_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the storage of a complete run, from that of an earlier version."""
    folder = tmp_path_factory.mktemp("docs") / "store"
    with tarfile.open(ROOT / "tests" / "data" / "store-schema-4.tar.gz") as packed:
        packed.extractall(folder, filter="data")
    migrate_store(LocalStore(str(folder)), report_nothing)
    return folder


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("body", find_blocks("python"))
def test_a_python_block_runs(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored_run: Path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-run").symlink_to(stored_run)
    exec(compile(body, "block", "exec"), {"__name__": "block"})


@pytest.fixture(scope="module")
def folder_of_a_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("docs-run")
    values = yaml.safe_load(write_recipe(folder).read_text())
    values["train"] |= {"num_workers": 1, "baseline": False}
    (folder / "my.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("page", OF_A_RUN)
def test_the_python_blocks_of_a_page_run_one_after_the_other(page, folder_of_a_run):
    names: dict[str, Any] = {"__name__": "block"}
    before = Path.cwd()
    os.chdir(folder_of_a_run)
    try:
        for block in read_blocks(page, "python"):
            exec(compile(block, "block", "exec"), names)
    finally:
        os.chdir(before)
    assert all(names["run"].status()["stages"].values())


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_leads_to_a_file_and_a_heading(page: Path):
    for link in LINK.findall(prose_of(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in list_anchors(target / "README.md" if target.is_dir() else target)


def list_settings(model: object = None, prefix: str = "") -> Iterator[str]:
    """Yield the names of all settings, such as `train.lambda`."""
    schema = Recipe.model_json_schema(by_alias=True)
    for section, value in schema["properties"].items():
        yield section
        names = re.findall(r"#/\$defs/(\w+)", str(value))
        for name in names:
            yield from (f"{section}.{key}" for key in schema["$defs"][name]["properties"])


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_path_test_and_setting_in_the_prose_exists(page: Path):
    settings = set(list_settings())
    sections = {name.partition(".")[0] for name in settings}
    for code in CODE.findall(prose_of(page)):
        first = code.split()[0]
        if REPO_PATH.fullmatch(first) and not PLACEHOLDERS.search(first.replace("README", "")):
            assert (ROOT / first).exists() or (page.parent / first).exists(), code
        if match := re.match(r"rayfuse ([a-z]+)", code):
            assert find_command(match[1]) is not None, code
        if match := TEST.match(code):
            assert match[2] is None or match_names(match[1], match[2]), code
        if (match := re.fullmatch(r"(\w+)\.(\w+)", code)) and match[1] in sections:
            assert code in settings or match[2] in ("py", "json", "yaml"), code


def test_the_settings_of_the_recipe_page_are_current():
    assert PAGE.read_text() == insert_settings(PAGE.read_text()), "run `make schema`"


def test_the_reference_of_the_api_page_is_current():
    page = api_reference.PAGE.read_text()
    assert page == api_reference.insert_reference(page), "run `make schema`"


def test_the_readme_fits_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
