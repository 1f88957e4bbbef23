"""The site has every page once, generated pages are current, and it builds without a warning."""

import ast
import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs import columns_page, commands_page, metrics_page
from docs.site_pages import list_linked, name_page, rewrite_links, separate_blocks, slugify

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
PARAGRAPH = re.compile(r"<p>(.*?)</p>", re.S)
MARKDOWN = re.compile(r"^\s*(?:[-*]|\d+\.) |^\s*\||```|<div", re.M)
LOADED = re.compile(r'<(?:script|img|iframe)[^>]* src="([^"]+)"|<link[^>]* href="([^"]+)"')
MESSAGE = re.compile(r"^\| `(.+?)` \|", re.M)
MKDOCS = shutil.which(
    "mkdocs", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
)


def list_nav(entries: Any) -> Iterator[str]:
    """Yield the pages of a navigation in their order."""
    if isinstance(entries, str):
        yield entries
    else:
        for entry in entries:
            yield from list_nav(entry if isinstance(entry, str) else next(iter(entry.values())))


def test_the_navigation_has_every_page_once():
    pages = list(list_nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert len(pages) == len(set(pages))
    assert {page for page in pages if not page.startswith("repository/")} == set(
        map(name_page, PAGES)
    )
    linked = {name_page(path) for path in list_linked(PAGES)}
    assert {page for page in pages if page.startswith("repository/")} <= linked


@pytest.mark.parametrize("module", [commands_page, columns_page, metrics_page])
def test_a_generated_page_is_current(module: Any):
    assert module.PAGE.read_text() == module.render_page(), "run `make schema`"


def list_texts() -> list[str]:
    """List the strings of the package, `…` in place of a value, and messages of others."""
    from ray._private.runtime_env import packaging

    texts = [os.strerror(errno.ENOSPC)]
    for path in (Path(packaging.__file__), *(ROOT / "rayfuse").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    part.value if isinstance(part, ast.Constant) else "…" for part in node.values
                ]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_every_message_of_troubleshooting_is_in_the_code():
    messages = MESSAGE.findall((ROOT / "docs" / "troubleshooting.md").read_text())
    assert len(messages) >= 30
    assert len(messages) == len(set(messages))
    texts = list_texts()
    unknown = [message for message in messages if not any(message in text for text in texts)]
    assert not unknown


def test_links_out_of_the_docs_lead_to_pages_of_the_site():
    page = ROOT / "docs" / "how-to" / "tasks.md"
    text = (
        "[log](../../LOG.md#a-b), [here](#x), [web](https://a.b/c)\n```sh\n[x](../../LOG.md)\n```\n"
    )
    assert rewrite_links(text, page) == text.replace(
        "(../../LOG.md#a-b)", "(../repository/LOG.md#a-b)"
    )
    assert rewrite_links("[a](../docs/status.md)", ROOT / "cluster" / "README.md") == (
        "[a](../../status.md)"
    )


def test_lists_tables_and_blocks_are_separated_as_github_reads_them():
    github = "a\n- b\n  c\n- d\n\ne\n```\n- f\n| g\n```\n```\nh\n```\n- i\n  ```\n  j\n  ```\n"
    github += "k\n| l |\n| - |"
    expected = github
    for start in ("- b", "```\n- f", "```\nh", "- i", "| l |"):
        expected = expected.replace(f"\n{start}", f"\n\n{start}")
    assert separate_blocks(github) == expected
    assert separate_blocks(expected) == expected


def test_anchors_are_those_of_github():
    assert slugify("`rayfuse run`: a, B – 2_c") == "rayfuse-run-a-b--2_c"


@pytest.mark.skipif(MKDOCS is None, reason="mkdocs is not installed: pip install 'rayfuse[docs]'")
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path):
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [str(MKDOCS), "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    for page in PAGES:
        html = (tmp_path / name_page(page)).with_suffix(".html").read_text()
        loaded = [script or link for script, link in LOADED.findall(html)]
        assert loaded
        assert not [address for address in loaded if "//" in address], page
        unread = [text for text in PARAGRAPH.findall(html) if MARKDOWN.search(text)]
        assert not unread, page
