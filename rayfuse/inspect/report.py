"""How two tokenizers align on a text: shares, losses, and the tokens that align worst."""

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rayfuse.align.matches import NO_SHARED_BOUNDARY, Matches, keep_one_to_one
from rayfuse.align.method import Alignment, load_method, map_for_matching
from rayfuse.align.token_spans import (
    PlacedTokens,
    TokenBytes,
    list_token_bytes,
    place_tokens,
)
from rayfuse.config.base import UserError
from rayfuse.models.tokenizer import TextTokenizer

WORST_TOKENS = 20

FLAGS = {
    "newlines": re.compile(r"[\n\r]"),
    "digits": re.compile(r"\d"),
    "CJK": re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]"),
    "whitespace": re.compile(r"^\s+$|\s\s"),
    "code": re.compile(r"[{}()\[\]<>=;_/\\|*#&$@^~`]"),
}
"""Kinds of token that often align badly, by their text; the first that fits is reported."""

PROBES = ("Hello world", "12 + 30 = 42", "Zwölf Boxkämpfer", "漢字かな", "a\n\n  b")
"""Texts on one of which two tokenizers must share a boundary, to be aligned at all."""


@dataclass(frozen=True)
class WorstToken:
    """A target token that often has no signal."""

    token: str
    without_signal: int
    occurrences: int
    flag: str


@dataclass(frozen=True)
class PairReport:
    """How a source's tokens align with a target's on some text."""

    method: str
    target_tokens: int
    """Target positions: tokens that a model of these tokens predicts."""
    source_tokens: int
    share_with_signal: float
    """Of target positions: the method finds a source position that they can learn from."""
    share_one_to_one: float
    """Of target positions: the next token is exactly one source token."""
    unplaced: dict[str, int]
    """Target positions without a signal for other reasons than `no_shared_boundary`, by reason."""
    no_shared_boundary: int
    """Target positions that start inside a source token."""
    tokens_per_second: float
    """Target tokens placed and matched, on one core; time for tokenizing is not counted."""
    worst_tokens: tuple[WorstToken, ...]

    def as_json(self) -> dict[str, Any]:
        """Return plain values for one JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class AlignedTexts:
    """Texts in both tokenizers' tokens, for a report and for a picture."""

    texts: tuple[str, ...]
    source: PlacedTokens
    target: PlacedTokens
    source_vocabulary: TokenBytes
    target_vocabulary: TokenBytes
    matches: Matches
    method: str
    seconds: float


def align_texts(
    texts: Sequence[str],
    source: TextTokenizer,
    target: TextTokenizer,
    method: str = "bytes",
) -> AlignedTexts:
    """Return texts, each taken for a whole document, in both tokenizers' tokens.

    Raises:
        UserError: The two cannot be aligned; the message shows a text on which they differ.
    """
    check_pair(source, target)
    return _align_texts(texts, source, target, method)


def _align_texts(
    texts: Sequence[str], source: TextTokenizer, target: TextTokenizer, method: str
) -> AlignedTexts:
    encoded = [text.encode() for text in texts]
    ours, theirs = list_token_bytes(source), list_token_bytes(target)
    rows = [each.encode_rows(list(texts), [True] * len(texts)) for each in (source, target)]
    loaded = load_method(method)
    used = np.unique(np.concatenate([np.zeros(0, dtype=np.int32), *rows[0]]))
    alignment = Alignment(ours, theirs, map_for_matching(loaded, used, source, target), loaded)
    began = time.perf_counter()
    source_tokens = _place_rows(rows[0], encoded, ours)
    target_tokens = _place_rows(rows[1], encoded, theirs)
    matches = loaded.match(source_tokens, target_tokens, alignment)
    seconds = time.perf_counter() - began
    return AlignedTexts(
        tuple(texts), source_tokens, target_tokens, ours, theirs, matches, method, seconds
    )


def _place_rows(rows: list[np.ndarray], texts: list[bytes], vocabulary: TokenBytes) -> PlacedTokens:
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    ids = np.concatenate([np.zeros(0, dtype=np.int32), *rows])
    return place_tokens(ids, offsets, texts, vocabulary, [True] * len(texts))


def check_pair(source: TextTokenizer, target: TextTokenizer) -> None:
    """Check that two tokenizers share a boundary inside at least one of some simple texts.

    Raises:
        UserError: They share none.
    """
    reasons: Counter[str] = Counter()
    for text in PROBES:
        aligned = _align_texts([text], source, target, "bytes")
        starts = aligned.source.ends[aligned.matches.source_at]
        if ((starts > 0) & (starts < len(text.encode()))).any():
            return
        reasons += Counter(aligned.matches.unmatched)
    told = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
    ours, theirs = (
        each.backend.encode(PROBES[0], add_special_tokens=False).tokens for each in (source, target)
    )
    raise UserError(
        f"these tokenizers cannot be aligned: on simple texts no position of the target has one of "
        f"the source ({told}); {PROBES[0]!r} is {ours} to the source and {theirs} to the target"
    )


def report_pair(aligned: AlignedTexts) -> PairReport:
    """Summarize an alignment of texts."""
    matches, target = aligned.matches, aligned.target
    positions = int(target.has_next.sum())
    one_to_one = keep_one_to_one(matches, aligned.source, target)
    unplaced = {
        reason: count for reason, count in matches.unmatched.items() if reason != NO_SHARED_BOUNDARY
    }
    return PairReport(
        method=aligned.method,
        target_tokens=positions,
        source_tokens=int(aligned.source.has_next.sum()),
        share_with_signal=len(matches.target_at) / max(positions, 1),
        share_one_to_one=len(one_to_one.target_at) / max(positions, 1),
        unplaced=unplaced,
        no_shared_boundary=matches.unmatched.get(NO_SHARED_BOUNDARY, 0),
        tokens_per_second=positions / aligned.seconds,
        worst_tokens=_find_worst(aligned),
    )


def _find_worst(aligned: AlignedTexts) -> tuple[WorstToken, ...]:
    """Find the target tokens that most often have no signal, the most frequent first."""
    target = aligned.target
    at = np.flatnonzero(target.has_next)
    next_ids = target.ids[at + 1]
    is_lost = np.isin(at, aligned.matches.target_at, invert=True)
    occurrences, lost = Counter(next_ids.tolist()), Counter(next_ids[is_lost].tolist())
    return tuple(
        WorstToken(
            name_token(aligned.target_vocabulary, token_id),
            count,
            occurrences[token_id],
            flag_token(aligned.target_vocabulary.spell(token_id)),
        )
        for token_id, count in lost.most_common(WORST_TOKENS)
    )


def name_token(vocabulary: TokenBytes, token_id: int) -> str:
    """Show a token as text, or its bytes in hexadecimal where they are not complete characters."""
    token = vocabulary.spell(token_id)
    if not token:
        return "EOS" if token_id == vocabulary.eos_id else f"[{token_id}]"
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "".join(f"<{byte:02X}>" for byte in token)


def flag_token(token: bytes) -> str:
    """Find the kind in `FLAGS` that a token belongs to; empty if none."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return "part of a character"
    return next((name for name, pattern in FLAGS.items() if pattern.search(text)), "")
