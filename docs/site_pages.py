"""Build hooks of the site (`make docs`): GitHub's Markdown, and the files that docs/ links to.

The pages are written for GitHub as well, where a link may lead to any file of the repository. Such
files become pages of the site below `repository/`, with the files that they link to in turn.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>\w*)\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S)
LINK = re.compile(r"\[[^]]+\]\(([^)\s]+)\)")
BLOCK = re.compile(r" *(?:(?P<list>[-*] |\d+\. )|(?P<table>\|)|(?P<fence>```))")
ELSEWHERE = "repository/"


def split_fences(text: str) -> list[str]:
    """Split Markdown into prose, at even indices, and fenced blocks, at odd ones."""
    parts, at = [], 0
    for fence in FENCE.finditer(text):
        parts += [text[at : fence.start()], fence[0]]
        at = fence.end()
    return [*parts, text[at:]]


def edit_prose(text: str, edit: Callable[[str], str]) -> str:
    """Apply a function to Markdown, without its fenced blocks."""
    parts = split_fences(text)
    parts[::2] = map(edit, parts[::2])
    return "".join(parts)


def slugify(heading: str, separator: str = "-") -> str:
    """Form the anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", separator)


def list_anchors(page: Path) -> set[str]:
    """List the anchors of a page's headings."""
    prose = "".join(split_fences(page.read_text(encoding="utf-8"))[::2])
    return set(map(slugify, re.findall(r"^#+ (.+)$", prose, re.M)))


def find_target(link: str, page: Path) -> Path | None:
    """Find the file of the repository that a page links to; None for any other address."""
    path = link.partition("#")[0]
    if "://" in link or not path:
        return None
    target = (page.parent / path).resolve()
    return target / "README.md" if target.is_dir() else target


def list_linked(pages: list[Path]) -> set[Path]:
    """List the files outside docs/ that pages link to, directly or by each other."""
    found: set[Path] = set()
    todo = list(pages)
    while todo:
        page = todo.pop()
        if page.suffix != ".md":
            continue
        links = LINK.findall("".join(split_fences(page.read_text(encoding="utf-8"))[::2]))
        targets = {target for link in links if (target := find_target(link, page))}
        new = {path for path in targets - found if ROOT / "docs" not in path.parents}
        found |= new
        todo += new
    return found


def name_page(path: Path) -> str:
    """Name a file of the repository by its place in the site."""
    name = path.relative_to(ROOT).as_posix()
    return name.removeprefix("docs/") if name.startswith("docs/") else ELSEWHERE + name


def rewrite_links(text: str, page: Path) -> str:
    """Make the links of a page lead to the places of files in the site."""
    folder = os.path.dirname(name_page(page))

    def rewrite(match: re.Match[str]) -> str:
        target = find_target(match[1], page)
        if target is None:
            return match[0]
        link = os.path.relpath(name_page(target), folder)
        anchor = match[1].partition("#")[1:]
        return match[0].removesuffix(f"({match[1]})") + f"({link}{''.join(anchor)})"

    return edit_prose(text, lambda prose: LINK.sub(rewrite, prose))


def separate_blocks(text: str) -> str:
    """Insert the empty lines around lists, tables and fenced blocks that GitHub does not need."""
    lines: list[str] = []
    in_fence, kind = False, None
    for line in text.split("\n"):
        match = BLOCK.match(line)
        kind_before, kind = kind, match.lastgroup if match else None
        is_border = "fence" in (kind, kind_before) or (kind and kind != kind_before)
        is_inside = in_fence or not lines or lines[-1].startswith(" ") or line.startswith(" ")
        if line and is_border and not is_inside and lines[-1]:
            lines.append("")
        lines.append(line)
        if in_fence or kind == "fence":
            in_fence = in_fence != (kind == "fence")
            kind = "fence"
    return "\n".join(lines)


def on_config(config: Any) -> Any:
    """Set what YAML cannot: the function that forms anchors."""
    config["mdx_configs"].setdefault("toc", {})["slugify"] = slugify
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the files outside docs/ that pages link to."""
    from mkdocs.structure.files import File  # the rest of this file works without mkdocs

    for path in sorted(list_linked(sorted((ROOT / "docs").rglob("*.md")))):
        files.append(File.generated(config, name_page(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Convert a page from GitHub's Markdown."""
    path = Path(page.file.abs_src_path)
    return separate_blocks(rewrite_links(markdown, path))
