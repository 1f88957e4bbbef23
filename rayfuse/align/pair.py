"""Align texts in the tokens of a source and a target, and check that the pair can be aligned."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayfuse.align.inside_tokens import find_inside_positions
from rayfuse.align.matches import Matches
from rayfuse.align.method import Alignment, load_method, map_for_matching
from rayfuse.align.token_spans import PlacedTokens, TokenBytes, list_token_bytes, place_tokens
from rayfuse.config.align import METHODS
from rayfuse.config.base import UserError
from rayfuse.models.tokenizer import TextTokenizer

PROBE_TEXTS = ("Hello world", "12 + 30 = 42", "Zwölf Boxkämpfer", "漢字かな", "a\n\n  b")
"""Two tokenizers must share a token boundary inside at least one of these texts."""


@dataclass(frozen=True)
class AlignedTexts:
    """Texts in the tokens of two tokenizers, with the positions that match."""

    texts: tuple[str, ...]
    source: PlacedTokens
    target: PlacedTokens
    source_vocabulary: TokenBytes
    target_vocabulary: TokenBytes
    matches: Matches
    num_inside: int
    """Other positions, inside source tokens, where `align.inside_tokens` may give a signal."""
    method: str
    seconds: float
    """To place and match the tokens, without tokenizing."""


def align_texts(
    texts: Sequence[str],
    source: TextTokenizer,
    target: TextTokenizer,
    method: str = "bytes",
) -> AlignedTexts:
    """Align texts, each a complete document.

    Raises:
        UserError: The two tokenizers cannot be aligned; the message shows how they differ.
    """
    check_pair(source, target)
    return _align_texts(texts, source, target, method)


def check_pair(source: TextTokenizer, target: TextTokenizer) -> None:
    """Check that two tokenizers share a token boundary inside at least one of `PROBE_TEXTS`.

    Raises:
        UserError: They share none.
    """
    reasons: Counter[str] = Counter()
    for text in PROBE_TEXTS:
        aligned = _align_texts([text], source, target, "bytes")
        starts = aligned.source.ends[aligned.matches.source_at]
        if ((starts > 0) & (starts < len(text.encode()))).any():
            return
        reasons += Counter(aligned.matches.unmatched)
    counted = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
    source_tokens, target_tokens = (
        tokenizer.backend.encode(PROBE_TEXTS[0], add_special_tokens=False).tokens
        for tokenizer in (source, target)
    )
    raise UserError(
        "these tokenizers cannot be aligned: on short probe texts no position of the target "
        f"matches one of the source ({counted}); {PROBE_TEXTS[0]!r} is {source_tokens} to the "
        f"source and {target_tokens} to the target; use another source"
    )


def _align_texts(
    texts: Sequence[str], source: TextTokenizer, target: TextTokenizer, method: str
) -> AlignedTexts:
    encoded = [text.encode() for text in texts]
    source_vocabulary, target_vocabulary = list_token_bytes(source), list_token_bytes(target)
    source_rows, target_rows = (
        tokenizer.encode_rows(list(texts), [True] * len(texts)) for tokenizer in (source, target)
    )
    loaded = load_method(method)
    used = np.unique(np.concatenate([np.zeros(0, dtype=np.int32), *source_rows]))
    maps = map_for_matching(loaded, used, source, target)
    alignment = Alignment(source_vocabulary, target_vocabulary, maps, loaded)
    began = time.perf_counter()
    source_tokens = _place_rows(source_rows, encoded, source_vocabulary)
    target_tokens = _place_rows(target_rows, encoded, target_vocabulary)
    matches = loaded.match(source_tokens, target_tokens, alignment)
    seconds = time.perf_counter() - began
    num_inside = 0
    if METHODS[method].can_look_inside:
        num_inside = len(find_inside_positions(source_tokens, target_tokens).target_at)
    return AlignedTexts(
        texts=tuple(texts),
        source=source_tokens,
        target=target_tokens,
        source_vocabulary=source_vocabulary,
        target_vocabulary=target_vocabulary,
        matches=matches,
        num_inside=num_inside,
        method=method,
        seconds=seconds,
    )


def _place_rows(rows: list[np.ndarray], texts: list[bytes], vocabulary: TokenBytes) -> PlacedTokens:
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    ids = np.concatenate([np.zeros(0, dtype=np.int32), *rows])
    return place_tokens(ids, offsets, texts, vocabulary, [True] * len(texts))
