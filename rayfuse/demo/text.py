"""Collect text that every Python installation has: code, prose and arithmetic."""

import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from rayfuse.config.base import UserError
from rayfuse.demo.arithmetic import write_sheets

PASSAGE_CHARS = 1250
"""Approximate length of a document: modules are split into passages between paragraphs."""

MIN_BLOCK_CHARS = 60
"""Shorter paragraphs are too common (`import os`) for a second one to count as a copy."""

LARGEST_FRESH_GROUP_BYTES = 60_000
"""Larger packages are used for pre-training only: one would be most of the held-out text."""

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
class SeenText:
    """Text that models were trained on, which must not be fused on or evaluated on."""

    groups: frozenset[str] = frozenset()
    """As DOMAIN/GROUP."""
    paragraphs: frozenset[bytes] = frozenset()
    """Hashes of paragraphs of at least `MIN_BLOCK_CHARS`: a group's text may be found in another
    group of another Python version."""


@dataclass(frozen=True)
class Document:
    """A passage of text; its id is DOMAIN/GROUP/NUMBER, and a group is never split."""

    doc_id: str
    domain: str
    text: str

    @property
    def group(self) -> str:
        """The package, topic or sheet of the passage."""
        return self.doc_id.split("/")[1]


@dataclass(frozen=True)
class Parts:
    """Three sets of documents that share no group."""

    pretrain: tuple[Document, ...]
    """Text for pre-training the models."""
    corpus: tuple[Document, ...]
    """Text of the fusion; no model is pre-trained on it."""
    held_out: tuple[Document, ...]
    """Text of the evaluation."""


@dataclass(frozen=True)
class PartSizes:
    """Bytes of a domain's text: minimum of corpus and held-out text, maximum for pre-training.

    With `pretrain` 0 there is no text for pre-training.
    """

    corpus: int
    held_out: int
    pretrain: int


SIZES = {
    "code": PartSizes(corpus=100_000, held_out=80_000, pretrain=3_000_000),
    "prose": PartSizes(corpus=100_000, held_out=80_000, pretrain=1_050_000),
    "arithmetic": PartSizes(corpus=100_000, held_out=80_000, pretrain=2_000_000),
}
DOMAINS = tuple(SIZES)

SPARE_BYTES = 200_000
"""Arithmetic beyond the three parts, so that every seed finds groups that no model has seen."""


def collect_domains(seed: int = 0, seen_text: SeenText | None = None) -> dict[str, list[Document]]:
    """Collect the documents of each domain, without duplicate paragraphs.

    Args:
        seed: Seed of the arithmetic. Code and prose depend on the Python version alone.
        seen_text: Groups and paragraphs to skip.

    Raises:
        UserError: The standard library's sources are missing.
    """
    known = seen_text or SeenText()
    code, docstrings = _read_library(Path(sysconfig.get_path("stdlib")), known.groups)
    seen = set(known.paragraphs)
    prose = _read_topics() | docstrings
    sizes = SIZES["arithmetic"]
    num_bytes = sizes.pretrain + sizes.corpus + sizes.held_out + SPARE_BYTES
    sheets = write_sheets(seed, num_bytes=num_bytes, sheet_chars=PASSAGE_CHARS)
    documents = {
        "code": _split_passages("code", code, seen),
        "prose": _split_passages("prose", prose, seen),
        "arithmetic": (
            Document(f"arithmetic/sheet-{number:05d}/0", "arithmetic", text)
            for number, text in enumerate(sheets)
        ),
    }
    return {
        domain: [
            document for document in of_domain if f"{domain}/{document.group}" not in known.groups
        ]
        for domain, of_domain in documents.items()
    }


def describe_seen(documents: Iterable[Document]) -> SeenText:
    """List the groups and the long paragraphs of documents."""
    groups: set[str] = set()
    paragraphs: set[bytes] = set()
    for document in documents:
        groups.add(f"{document.domain}/{document.group}")
        for block in document.text.split("\n\n"):
            key = _join_words(block)
            if len(key) >= MIN_BLOCK_CHARS:
                paragraphs.add(hash_paragraph(key))
    return SeenText(frozenset(groups), frozenset(paragraphs))


HASH_BYTES = 8


def hash_paragraph(words: str) -> bytes:
    """Hash a paragraph, its words joined by single spaces."""
    return hashlib.blake2b(words.encode(), digest_size=HASH_BYTES).digest()


def _join_words(block: str) -> str:
    return " ".join(block.split())


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
        fused = _take_groups(rest, wanted.corpus, LARGEST_FRESH_GROUP_BYTES)
        evaluated = _take_groups(rest, wanted.held_out, LARGEST_FRESH_GROUP_BYTES)
        corpus += fused
        held_out += evaluated
        own = _take_groups(rest, wanted.pretrain, None)
        if (
            count_bytes(fused) < wanted.corpus
            or count_bytes(evaluated) < wanted.held_out
            or count_bytes(own) < min(wanted.corpus, wanted.pretrain)
        ):
            raise UserError(
                f"the demo's text comes from this Python's standard library, which holds too "
                f"little {domain} ({count_bytes(documents)} bytes that no shipped model was "
                "trained on); use a Python with its sources, or --train-models"
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
    """Count the bytes of documents' texts in UTF-8."""
    return sum(len(document.text.encode()) for document in documents)


def _read_library(
    root: Path, skipped: frozenset[str]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Collect the paragraphs of code and of docstrings, by package or module.

    Args:
        root: The folder of the standard library.
        skipped: Groups as DOMAIN/GROUP; a file of which neither domain is wanted is not parsed.
    """
    code: dict[str, list[str]] = {}
    docstrings: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        is_table = relative.as_posix() in TABLES
        if EXCLUDED.intersection(relative.parts) or is_table or _is_built(relative):
            continue
        # `_pydecimal` and `decimal` are one group, as they share most of their text.
        group = re.sub("^_(py)?", "", relative.parts[0].removesuffix(".py"))
        if {f"code/{group}", f"prose/{group}"} <= skipped:
            continue
        try:
            bare, found = split_docstrings(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # not UTF-8, or a file with intended syntax errors
            continue
        code.setdefault(group, []).extend(_split_blocks(bare))
        for text in found:
            docstrings.setdefault(group, []).extend(filter(_is_prose, _split_blocks(text)))
    return code, docstrings


def _is_built(path: Path) -> bool:
    """Recognise files written when Python was built, which differ between installations."""
    return path.parts[0].startswith(("config-", "_sysconfigdata", "__"))


def split_docstrings(source: str) -> tuple[str, list[str]]:
    """Split a module into its source without docstrings, and its docstrings without indentation.

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
        # A body with only a docstring needs another statement; so does `def f(): "Text."`.
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
    """Collect the paragraphs of the language reference in `help()`, by topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some Linux distributions do not install it
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


def _split_passages(
    domain: str, groups: dict[str, list[str]], seen: set[bytes]
) -> Iterator[Document]:
    """Yield each group's paragraphs as documents, without those in `seen`; adds them to `seen`.

    Args:
        domain: The domain of the groups.
        groups: Paragraphs by group.
        seen: Hashes of paragraphs.
    """
    for group, blocks in groups.items():
        passages: list[list[str]] = [[]]
        for block in blocks:
            key = _join_words(block)
            if len(key) >= MIN_BLOCK_CHARS:
                hashed = hash_paragraph(key)
                if hashed in seen:
                    continue
                seen.add(hashed)
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
    """Remove groups from the start of a list until their text has `num_bytes` bytes.

    Args:
        groups: Changed in place; groups that are too large stay in it.
        num_bytes: Minimum bytes to take.
        largest: Maximum bytes of a group; None for no limit.
    """
    taken: list[Document] = []
    remaining: list[list[Document]] = []
    for group in groups:
        size = count_bytes(group)
        if num_bytes > 0 and (largest is None or size <= largest):
            taken += group
            num_bytes -= size
        else:
            remaining.append(group)
    groups[:] = remaining
    return taken


def _shuffle(documents: list[Document], seed: int) -> tuple[Document, ...]:
    shuffled = sorted(documents, key=lambda document: document.doc_id)
    Random(seed).shuffle(shuffled)
    return tuple(shuffled)
