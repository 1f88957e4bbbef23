"""Real text that every Python has, in three domains: code, prose and worked arithmetic."""

import ast
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from rayfuse.config.base import UserError
from rayfuse.demo.arithmetic import write_sheets

PASSAGE_CHARS = 2500
"""About how long a document is: modules are cut into passages, between paragraphs."""

MIN_BLOCK_CHARS = 60
"""Shorter paragraphs are too common (`import os`) for a second one to count as a copy."""

LARGEST_FRESH_GROUP_BYTES = 60_000
"""Larger packages serve pre-training only: one of them would be most of the held-out text."""

EXCLUDED = frozenset(
    # Tests, tables, copies, files that distributions change or omit, and the topics themselves.
    [
        "test",
        "tests",
        "idlelib",
        "encodings",
        "pydoc_data",
        "lib2to3",
        "ensurepip",
        "site-packages",
        "dist-packages",
        "lib-dynload",
        "__phello__",
        "turtledemo",
    ]
)
TABLES = frozenset(["html/entities.py", "stringprep.py", "this.py", "_aix_support.py"])
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Document:
    """A passage of text; its id is DOMAIN/GROUP/NUMBER, and a group is never split."""

    doc_id: str
    domain: str
    text: str

    @property
    def group(self) -> str:
        """The package, topic or sheet it is from."""
        return self.doc_id.split("/")[1]


@dataclass(frozen=True)
class Parts:
    """Three sets of documents that share no group."""

    pretrain: tuple[Document, ...]
    """What the models are made from."""
    corpus: tuple[Document, ...]
    """What they are fused on; no model has seen it."""
    held_out: tuple[Document, ...]
    """What they are judged on, once."""


@dataclass(frozen=True)
class PartSizes:
    """Bytes of text per domain, for each of the two small parts and the most for the large one."""

    corpus: int
    held_out: int
    pretrain: int


SIZES = {
    "code": PartSizes(corpus=300_000, held_out=120_000, pretrain=3_000_000),
    "prose": PartSizes(corpus=250_000, held_out=120_000, pretrain=3_000_000),
    "arithmetic": PartSizes(corpus=200_000, held_out=80_000, pretrain=2_000_000),
}
DOMAINS = tuple(SIZES)


def collect_domains(seed: int = 0) -> dict[str, list[Document]]:
    """Return the documents of each domain, no paragraph twice.

    Args:
        seed: Of the arithmetic. Code and prose depend on the Python version alone.

    Raises:
        UserError: The standard library's sources are not there.
    """
    code, docstrings = _read_library(Path(sysconfig.get_path("stdlib")))
    seen: set[str] = set()
    prose = _read_topics() | docstrings
    sizes = SIZES["arithmetic"]
    sheets = write_sheets(
        seed, num_bytes=sizes.pretrain + sizes.corpus + sizes.held_out, sheet_chars=PASSAGE_CHARS
    )
    return {
        "code": list(_cut_passages("code", code, seen)),
        "prose": list(_cut_passages("prose", prose, seen)),
        "arithmetic": [
            Document(f"arithmetic/sheet-{number:05d}/0", "arithmetic", text)
            for number, text in enumerate(sheets)
        ],
    }


def split_documents(
    domains: dict[str, list[Document]], seed: int = 0, sizes: dict[str, PartSizes] | None = None
) -> Parts:
    """Divide documents into three parts by complete groups, and shuffle each part.

    Raises:
        UserError: A domain has too little text.
    """
    corpus: list[Document] = []
    held_out: list[Document] = []
    pretrain: list[Document] = []
    for domain, documents in domains.items():
        wanted = (sizes or SIZES)[domain]
        rest = _group_documents(documents, Random(f"{seed}/{domain}"))
        corpus += _take_groups(rest, wanted.corpus, LARGEST_FRESH_GROUP_BYTES)
        held_out += _take_groups(rest, wanted.held_out, LARGEST_FRESH_GROUP_BYTES)
        own = _take_groups(rest, wanted.pretrain, None)
        if count_bytes(own) < wanted.corpus:
            raise UserError(
                f"the demo's text comes from this Python's standard library, which holds too "
                f"little {domain} ({count_bytes(documents)} bytes); use a Python with its sources"
            )
        pretrain += own
    return Parts(*(_shuffle(part, seed) for part in (pretrain, corpus, held_out)))


def write_documents(documents: Iterable[Document], path: Path) -> None:
    """Write documents as JSON Lines of `id`, `domain` and `text`, in the order given.

    A file that has this content already is not rewritten: its modification time is part of the
    run's fingerprint.
    """
    records = [
        {"id": document.doc_id, "domain": document.domain, "text": document.text}
        for document in documents
    ]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    content = "".join(lines).encode()
    if not path.is_file() or path.read_bytes() != content:
        path.write_bytes(content)


def count_bytes(documents: Iterable[Document]) -> int:
    """Return the length of documents' texts in UTF-8."""
    return sum(len(document.text.encode()) for document in documents)


def _read_library(root: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the paragraphs of code and of docstrings of each package or module."""
    code: dict[str, list[str]] = {}
    docstrings: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if EXCLUDED.intersection(place.parts) or place.as_posix() in TABLES or _is_built(place):
            continue
        try:
            bare, found = split_docstrings(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # an ancient encoding, or a file that shows bad syntax
            continue
        # `_pydecimal` and `decimal` are one group: what is private here is public there.
        group = re.sub("^_(py)?", "", place.parts[0].removesuffix(".py"))
        code.setdefault(group, []).extend(_split_blocks(bare))
        for text in found:
            docstrings.setdefault(group, []).extend(filter(_is_prose, _split_blocks(text)))
    return code, docstrings


def _is_built(place: Path) -> bool:
    """Recognise files written when Python was built, which differ between installations."""
    return place.parts[0].startswith(("config-", "_sysconfigdata", "__"))


def split_docstrings(source: str) -> tuple[str, list[str]]:
    """Return a module's source without its docstrings, and the docstrings, indentation removed.

    Raises:
        SyntaxError: It is not this Python's source code.
    """
    lines: list[str | None] = [*source.split("\n")]
    found: list[tuple[int, str]] = []
    for owner in _walk_statements(ast.parse(source)):
        if not isinstance(owner, DOCUMENTED):
            continue
        text = ast.get_docstring(owner)
        if text is None:
            continue
        first = owner.body[0]
        start, end = first.lineno - 1, first.end_lineno or first.lineno
        found.append((start, text))
        before = (lines[start] or "").encode()[: first.col_offset].decode()
        lines[start:end] = [None] * (end - start)
        # A body of nothing but its docstring needs another statement; so does `def f(): "Text."`.
        if len(owner.body) == 1 or before.strip():
            lines[start] = before + "pass"
    return "\n".join(line for line in lines if line is not None), [
        text for _, text in sorted(found)
    ]


def _walk_statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and the statements in it; 7 times as fast as `ast.walk`, which enters all."""
    yield node
    for block in ("body", "orelse", "handlers", "finalbody", "cases"):
        for statement in getattr(node, block, ()):
            yield from _walk_statements(statement)


def _read_topics() -> dict[str, list[str]]:
    """Return the paragraphs of the language reference that `help()` shows, by topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # a Linux distribution may leave it out; the docstrings remain
        return {}
    return {
        f"topic-{name}": list(filter(_is_prose, _split_blocks(text)))
        for name, text in sorted(topics.items())
    }


def _split_blocks(text: str) -> list[str]:
    """Split a text into paragraphs at empty lines, trailing spaces removed."""
    lines = "\n".join(line.rstrip() for line in text.expandtabs(8).split("\n"))
    return [block.strip("\n") for block in re.split(r"\n\n+", lines) if block.strip()]


def _is_prose(block: str) -> bool:
    """Recognise English prose, as opposed to an example, a table or a signature."""
    words = sum(char.isalpha() or char.isspace() for char in block)
    is_example = ">>>" in block or "::=" in block or "+--" in block or "===" in block
    return not is_example and len(block) >= MIN_BLOCK_CHARS and words > 0.85 * len(block)


def _cut_passages(domain: str, groups: dict[str, list[str]], seen: set[str]) -> Iterator[Document]:
    """Yield each group's paragraphs as documents, without those in `seen`, which it updates."""
    for group, blocks in groups.items():
        passages: list[list[str]] = [[]]
        for block in blocks:
            key = " ".join(block.split())
            if key in seen:
                continue
            if len(key) >= MIN_BLOCK_CHARS:
                seen.add(key)
            if sum(map(len, passages[-1])) + len(block) > PASSAGE_CHARS and passages[-1]:
                passages.append([])
            passages[-1].append(block)
        for number, passage in enumerate(passages):
            if passage:
                yield Document(f"{domain}/{group}/{number}", domain, "\n\n".join(passage) + "\n")


def _group_documents(documents: Sequence[Document], random: Random) -> list[list[Document]]:
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(document.group, []).append(document)
    names = sorted(groups)
    random.shuffle(names)
    return [groups[name] for name in names]


def _take_groups(
    groups: list[list[Document]], num_bytes: int, largest: int | None
) -> list[Document]:
    """Take groups off a list, first to last, until their text has so many bytes."""
    taken: list[Document] = []
    left: list[list[Document]] = []
    for group in groups:
        size = count_bytes(group)
        if num_bytes > 0 and (largest is None or size <= largest):
            taken += group
            num_bytes -= size
        else:
            left.append(group)
    groups[:] = left
    return taken


def _shuffle(documents: list[Document], seed: int) -> tuple[Document, ...]:
    shuffled = sorted(documents, key=lambda document: document.doc_id)
    Random(seed).shuffle(shuffled)
    return tuple(shuffled)
