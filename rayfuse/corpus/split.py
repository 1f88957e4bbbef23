"""Documents -> rows: split near a line end or a space, so that every tokenizer fits."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rayfuse.corpus.documents import Document
from rayfuse.models.chat import Message
from rayfuse.models.tokenizer import TextTokenizer

CUT_SEARCH_SHARE = 0.2
"""How far before the last possible cut a line end or space is searched, as a share of the row."""

CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f]")
CONTROL_SHARE = 0.01
"""A document with a larger share of control characters is rejected as binary."""


EMPTY = "empty"
"""The kind of a reject that loses nothing."""


@dataclass(frozen=True)
class Row:
    """A piece of a document that fits every tokenizer."""

    document: Document
    place: int
    text: str
    """Of a conversation, its answers end to end."""
    ends_document: bool
    messages: tuple[Message, ...] = ()
    """Of a conversation."""


def find_fault(document: Document, max_bytes: int) -> str | None:
    """Give the reason why a document cannot be used; None if it can."""
    if document.fault is not None:
        return document.fault
    if not document.text.strip():
        return EMPTY
    text = document.full_text
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
    """Decide by its id alone whether a document belongs to the held-out share."""
    digest = hashlib.sha256(document.doc_id.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def is_for_selection(doc_id: str) -> bool:
    """Decide by its id alone whether a held-out document chooses weights instead of judging them.

    Where training keeps the weights that are best on held-out text (`train.publish: best`), half of
    the documents choose them, and the report compares models on the other half.
    """
    digest = hashlib.sha256(doc_id.encode("utf-8", "surrogatepass")).digest()
    return bool(digest[8] & 1)  # not the bytes that `is_held_out` uses


def split_document(
    document: Document, tokenizers: Sequence[TextTokenizer], max_tokens: int
) -> list[Row]:
    """Split a document into rows; their texts, joined, are its text.

    Args:
        document: A document without a fault.
        tokenizers: Each row fits all of them, start token and EOS included.
        max_tokens: Maximum tokens of a row.
    """
    text = document.text
    widest = 8 * max_tokens  # characters; more than a row of nearly any text has
    num_chars = widest
    pieces = [(0, len(text))]  # a stack: the last one is processed next
    done: list[str] = []
    while pieces:
        start, stop = pieces.pop()
        cut = start + _find_cut(text, start, stop, num_chars, tokenizers, max_tokens)
        if cut == stop:
            done.append(text[start:stop])
            num_chars = min(widest, 4 * (stop - start))
        else:
            pieces += [(cut, stop), (start, cut)]
    last = len(done) - 1
    return [Row(document, place, text, place == last) for place, text in enumerate(done)]


def _find_cut(
    text: str,
    start: int,
    stop: int,
    num_chars: int,
    tokenizers: Sequence[TextTokenizer],
    max_tokens: int,
) -> int:
    """Find the length in characters of the first row of a piece; its own length if it fits.

    Args:
        text: The document; the piece is text[start:stop].
        start: In characters.
        stop: In characters.
        num_chars: Size of the first window that is tokenized, in characters. It is doubled until
            it holds a row, so that the time is linear in the text.
        tokenizers: As for `split_document`.
        max_tokens: As for `split_document`.
    """
    while True:
        window = text[start : min(stop, start + num_chars)]
        cut = min(_count_chars_that_fit(window, tokenizer, max_tokens) for tokenizer in tokenizers)
        if cut < len(window):
            return move_to_space(window, cut)
        if start + cut == stop:
            return cut
        num_chars *= 2


def _count_chars_that_fit(text: str, tokenizer: TextTokenizer, max_tokens: int) -> int:
    ((ids, chars),) = tokenizer.encode_with_ends([text])
    room = max_tokens - tokenizer.count_specials()
    if len(ids) <= room:
        return len(text)
    # Token number `room` is the first that does not fit: end where it starts.
    return max(1, min(int(chars[room, 0]), len(text) - 1))


def move_to_space(text: str, cut: int) -> int:
    """Move a cut back to the nearest line end, else to the nearest space, else leave it."""
    start = max(1, int(cut * (1 - CUT_SEARCH_SHARE)))
    for separator in ("\n", " "):
        found = text.rfind(separator, start - 1, cut)
        if found >= 0:
            return found + 1
    return cut
