"""How two tokenizers align on a text: shares, losses, and the tokens that align worst."""

import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rayfuse.align.matches import NO_SHARED_BOUNDARY, keep_one_to_one
from rayfuse.align.pair import AlignedTexts
from rayfuse.align.token_spans import (
    TokenBytes,
)

WORST_TOKENS = 20

FLAGS = {
    "newlines": re.compile(r"[\n\r]"),
    "digits": re.compile(r"\d"),
    "CJK": re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]"),
    "whitespace": re.compile(r"^\s+$|\s\s"),
    "code": re.compile(r"[{}()\[\]<>=;_/\\|*#&$@^~`]"),
}
"""Kinds of token that often align badly, by their text; the first that fits is reported."""


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
    share_inside: float
    """Of target positions: inside a source token, where `align.inside_tokens` gives a signal if the
    source's distribution at the token's start has enough mass there."""
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
        share_inside=aligned.num_inside / max(positions, 1),
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
