"""Source vocabulary -> target vocabulary: the same bytes, or the first token that spells them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from rayfuse.tokens import TextTokenizer

ANCHOR = "\n"
"""Put before a text to keep a tokenizer from adding a blank to it."""


def map_vocabulary(
    source: TextTokenizer, target: TextTokenizer
) -> Int[np.ndarray, " source_vocab"]:
    """Return for each source id the target id that its mass goes to, -1 for the tail.

    A source token goes to the target token with the same bytes; failing that, to the first token
    of the target's own tokenisation of those bytes. EOS goes to EOS; other special tokens have no
    counterpart.
    """
    by_bytes: dict[bytes, int] = {}
    for token_id, spelled in enumerate(target.token_bytes):
        if spelled:
            by_bytes.setdefault(spelled, token_id)  # the lowest id of several
    mapped = np.full(source.vocab_size, -1, dtype=np.int32)
    unmatched: list[int] = []
    for token_id, spelled in enumerate(source.token_bytes):
        if spelled and spelled in by_bytes:
            mapped[token_id] = by_bytes[spelled]
        elif spelled:
            unmatched.append(token_id)
    texts = [source.token_bytes[token_id] or b"" for token_id in unmatched]
    mapped[unmatched] = _first_tokens(texts, target, by_bytes)
    if source.eos_id is not None:
        mapped[source.eos_id] = -1 if target.eos_id is None else target.eos_id
    return mapped


def _first_tokens(
    texts: Sequence[bytes], target: TextTokenizer, by_bytes: dict[bytes, int]
) -> list[int]:
    """Return the first token of the target's tokenisation of each text, as inside a longer text."""
    anchor = ANCHOR if target.adds_blank else ""
    decoded = [text.decode("utf-8", errors="replace") for text in texts]
    rows = target.encode([anchor + text for text in decoded])
    firsts: list[int] = []
    for text, ids in zip(texts, rows, strict=True):
        found = _token_after(target, ids, len(anchor) + bool(anchor))
        spelled = b"" if found < 0 else target.token_bytes[found] or b""
        is_first = bool(spelled) and text.startswith(spelled)
        firsts.append(found if is_first else _longest_prefix(text, by_bytes))
    return firsts


def _token_after(target: TextTokenizer, ids: Int[np.ndarray, " tokens"], num_bytes: int) -> int:
    """Return the token that begins after a number of bytes, -1 if none begins there."""
    done = 0
    for token_id in ids.tolist():
        if done == num_bytes:
            return token_id
        done += len(target.token_bytes[token_id] or b"")
    return -1


def _longest_prefix(text: bytes, by_bytes: dict[bytes, int]) -> int:
    """Return the longest token that begins a text: for bytes that are no whole characters."""
    for length in range(len(text), 0, -1):
        if text[:length] in by_bytes:
            return by_bytes[text[:length]]
    return -1
