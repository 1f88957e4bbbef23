"""`rayfuse import`: describe another tool's store, and write its texts as documents."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from rich.console import Console

from rayfuse.config.base import UserError
from rayfuse.imports.store import (
    ForeignStore,
    hash_tokens,
    list_vocabulary,
    open_foreign_store,
    strip_specials,
)
from rayfuse.models.tokenizer import TextTokenizer, load_tokenizer
from rayfuse.runtime.console import PlainConsole

NO_TEXT = "has no text"
CONTROL_TOKENS = "has special tokens, or ids that the tokenizer lacks, inside the text"
OTHER_TOKENS = "the tokenizer gives its text other tokens"
TWICE = "its text is there twice"


@dataclass
class Texts:
    """What became of the texts of a store."""

    written: int = 0
    tokens: int = 0
    longest: int = 0
    """Tokens of the longest text, special tokens excluded."""
    skipped: Counter[str] = field(default_factory=Counter[str])
    """How many were not written, by the reason."""


def import_store(
    path: str,
    documents: str,
    model: str,
    *,
    revision: str | None = None,
    aligned: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write the texts of another tool's store as documents, and print how a recipe uses both.

    A text is recovered from its tokens by the tokenizer. It is written only if the tokenizer gives
    it the same tokens again, as its distributions could not be found otherwise.

    Args:
        path: The store's folder.
        documents: The JSON Lines file to write; it must not exist.
        model: A folder or hub id with the tokenizer that the store was made with.
        revision: The hub's commit, branch or tag of the model.
        aligned: For the alignment stage of FuseLLM, the number of the source there.
        console: Where it is printed; by default nothing is.

    Returns:
        What `rayfuse import --json` prints: the layout, what it lacks, counts of texts and tokens.

    Raises:
        UserError: The store or the tokenizer cannot be read, the file exists, or no text can be
            recovered.
    """
    store = open_foreign_store(path, aligned)
    tokenizer = load_tokenizer(model, revision)
    place = Path(documents).expanduser()
    if place.suffix != ".jsonl":
        raise UserError(f"the documents are {documents!r}; give a name that ends with .jsonl")
    if place.exists():
        raise UserError(f"the documents are {documents!r}, a file that exists; give another name")
    console = console or PlainConsole(None, quiet=True)
    _print_store(store, console)
    texts = Texts()
    unfinished = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            for number, text in enumerate(_recover_texts(store, tokenizer, texts)):
                file.write(
                    json.dumps({"id": f"t{number}", "text": text}, ensure_ascii=False) + "\n"
                )
        _check_texts(texts, path, model)
        unfinished.replace(place)
    finally:
        unfinished.unlink(missing_ok=True)
    _print_texts(texts, place, console)
    console.print(
        "In a recipe (raise max_tokens if another tokenizer needs more tokens for a text: a text "
        "that is split is not found):",
        highlight=False,
    )
    source = suggest_source(path, model, revision=revision, aligned=aligned)
    for line in _suggest(documents, source, texts.longest + tokenizer.count_specials()):
        console.print(f"  {line}", highlight=False, markup=False)
    return {
        "format": store.format.name,
        "bytes": store.num_bytes,
        "rows": store.num_rows,
        "top_k": store.format.top_k,
        "lacks": list(store.format.lacks),
        "texts": texts.written,
        "tokens": texts.tokens,
        "longest": texts.longest,
        "skipped": dict(texts.skipped),
    }


def _recover_texts(store: ForeignStore, tokenizer: TextTokenizer, texts: Texts) -> Iterator[str]:
    """Yield the texts that can be recovered, and count them and the others."""
    seen: set[bytes] = set()
    vocabulary = list_vocabulary(tokenizer)
    for _, _, tokens in store.read_token_rows():
        first, stop, is_text = strip_specials(tokens, vocabulary)
        own = tokens[first:stop]
        text, reason = "", NO_TEXT
        if len(own):
            text, reason = _recover_text(own, tokenizer) if is_text else ("", CONTROL_TOKENS)
        key = hash_tokens(own)
        if not reason and key in seen:
            reason = TWICE
        if reason:
            texts.skipped[reason] += 1
            continue
        seen.add(key)
        texts.written += 1
        texts.tokens += len(own)
        texts.longest = max(texts.longest, len(own))
        yield text


def _recover_text(tokens: Int[np.ndarray, " _"], tokenizer: TextTokenizer) -> tuple[str, str]:
    """Recover a text from its tokens, and the reason why it cannot be used; empty for none."""
    spelled = b"".join(tokenizer.token_bytes[token] or b"" for token in tokens.tolist())
    try:
        text = spelled.decode()
    except UnicodeDecodeError:
        return "", OTHER_TOKENS
    for candidate in (text.removeprefix(" "), text) if tokenizer.adds_prefix_space else (text,):
        (again,) = tokenizer.encode([candidate])
        if np.array_equal(again, tokens):
            return candidate, ""
    return "", OTHER_TOKENS


def _check_texts(texts: Texts, path: str, model: str) -> None:
    if not texts.written:
        raise UserError(
            f"no text of {path!r} can be recovered by the tokenizer of {model!r} "
            f"({_list_skipped(texts)}); give the model that the store was made with. Chats, whose "
            "special tokens are inside the text, cannot be imported"
        )


def _list_skipped(texts: Texts) -> str:
    return ", ".join(f"{count:,}: {reason}" for reason, count in texts.skipped.items())


def _print_store(store: ForeignStore, console: Console) -> None:
    console.print(
        f"{store.folder}: {store.format.name}, {store.num_rows:,} texts in {len(store.files)} "
        f"files, {store.num_bytes:,} bytes, top {store.format.top_k}",
        highlight=False,
        markup=False,
    )
    for lack in store.format.lacks:
        console.print(f"it lacks {lack}", highlight=False, markup=False)


def _print_texts(texts: Texts, place: Path, console: Console) -> None:
    console.print(
        f"{place}: {texts.written:,} texts, {texts.tokens:,} tokens, the longest has "
        f"{texts.longest:,}",
        highlight=False,
        markup=False,
    )
    if texts.skipped:
        console.print(f"not written: {_list_skipped(texts)}", highlight=False, markup=False)


def suggest_source(
    path: str, model: str, *, revision: str | None, aligned: int | None
) -> dict[str, object]:
    """Write the settings of a source that is imported from the store."""
    source = {"name": "imported", "model": model, "revision": revision, "captured_from": path}
    given = source | {"captured_aligned": aligned}
    return {name: value for name, value in given.items() if value is not None}


def _suggest(documents: str, source: dict[str, object], max_tokens: int) -> list[str]:
    """Write the lines of a recipe that uses the store as a source."""
    return [
        f"corpus: {json.dumps({'documents': documents, 'max_tokens': max(max_tokens, 16)})}",
        f"sources: [{json.dumps(source)}]",
    ]
