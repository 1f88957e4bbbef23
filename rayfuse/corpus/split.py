"""Documents -> rows: cut near a line end or blank, where every tokenizer still fits."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rayfuse.corpus.documents import Document
from rayfuse.models.tokenizer import TextTokenizer

CUT_SEARCH_SHARE = 0.2
"""How far back from the last possible cut a line end or blank is looked for, in shares of a row."""

CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f]")
CONTROL_SHARE = 0.01
"""More control characters than this and the document is taken for binary."""


@dataclass(frozen=True)
class Row:
    """A piece of a document that fits every tokenizer."""

    document: Document
    place: int
    text: str
    ends_document: bool


def find_fault(document: Document, max_bytes: int) -> str | None:
    """Return why a document cannot be used, or nothing."""
    if document.fault is not None:
        return document.fault
    text = document.text
    if not text.strip():
        return "empty"
    if len(text) > max_bytes:
        return f"over-long: {len(text)} characters, corpus.max_document_bytes is {max_bytes}"
    try:
        num_bytes = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        return "invalid UTF-8: lone surrogate"
    if num_bytes > max_bytes:
        return f"over-long: {num_bytes} bytes, corpus.max_document_bytes is {max_bytes}"
    if "\x00" in text or len(CONTROL_CHARACTERS.findall(text)) > CONTROL_SHARE * len(text):
        return "binary: control characters"
    return None


def is_held_out(document: Document, share: float) -> bool:
    """Return whether a document is among the share kept for evaluation; by its id alone."""
    digest = hashlib.sha256(document.doc_id.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def cut_document(
    document: Document, tokenizers: Sequence[TextTokenizer], max_tokens: int
) -> list[Row]:
    """Return a document's rows: their texts joined are its text.

    Args:
        document: One without a fault.
        tokenizers: All that must take each row, start token and EOS counted.
        max_tokens: At most this many in a row.
    """
    text = document.text
    widest = 8 * max_tokens  # more than a row holds of nearly any text
    num_chars = widest
    pieces = [(0, len(text))]  # the last is the next
    whole: list[str] = []
    while pieces:
        start, stop = pieces.pop()
        cut = start + _find_cut(text, start, stop, num_chars, tokenizers, max_tokens)
        if cut == stop:
            whole.append(text[start:stop])
            num_chars = min(widest, 4 * (stop - start))
        else:
            pieces += [(cut, stop), (start, cut)]
    last = len(whole) - 1
    return [Row(document, place, text, place == last) for place, text in enumerate(whole)]


def _find_cut(
    text: str,
    start: int,
    stop: int,
    num_chars: int,
    tokenizers: Sequence[TextTokenizer],
    max_tokens: int,
) -> int:
    """Return how many characters the first row of a piece may have; all if it fits whole.

    Args:
        text: The document; the piece is text[start:stop].
        start: In characters.
        stop: In characters.
        num_chars: How many are tried first. More cost more, fewer may have to be doubled.
        tokenizers: As for `cut_document`.
        max_tokens: As for `cut_document`.
    """
    while True:
        window = text[start : min(stop, start + num_chars)]
        cut = min(_count_chars_that_fit(window, each, max_tokens) for each in tokenizers)
        if cut < len(window):
            return _move_to_blank(window, cut)
        if start + cut == stop:
            return cut
        num_chars *= 2


def _count_chars_that_fit(text: str, tokenizer: TextTokenizer, max_tokens: int) -> int:
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    room = max_tokens - tokenizer.count_specials()
    if len(encoding.ids) <= room:
        return len(text)
    # Token number `room` is the first without a place: end where it starts.
    return max(1, min(encoding.offsets[room][0], len(text) - 1))


def _move_to_blank(text: str, cut: int) -> int:
    """Return the last line end, else the last blank, a little before a cut; else the cut."""
    start = max(1, int(cut * (1 - CUT_SEARCH_SHARE)))
    for sign in ("\n", " "):
        found = text.rfind(sign, start - 1, cut)
        if found >= 0:
            return found + 1
    return cut
