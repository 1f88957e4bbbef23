"""Where tokens end in the text, for all rows of a shard at once.

The rows of a shard are laid out as one long text with a gap of one byte between rows, so that a
byte's number says which row it is in and one sorted search serves the whole shard.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from rayfuse.tokens import TextTokenizer


@dataclass(frozen=True)
class SpelledVocabulary:
    """The bytes of every token, end to end."""

    lengths: Int[np.ndarray, " vocab"]
    """Bytes that each token spells; 0 for special tokens and ids that do not exist."""
    starts: Int[np.ndarray, " vocab"]
    """Where each token's bytes begin in `blob`."""
    blob: np.ndarray
    """uint8: all tokens' bytes."""
    adds_blank: bool
    """The first token of a text spells a blank that the text does not have."""
    eos_id: int | None
    start_id: int | None


@dataclass(frozen=True)
class PlacedTokens:
    """A shard's tokens of one tokenizer, each with its place in the shard's bytes."""

    ids: Int[np.ndarray, " tokens"]
    ends: Int[np.ndarray, " tokens"]
    """The byte after the last one a token spells: what the model says at the token starts there.
    Never decreases."""
    is_placed: Bool[np.ndarray, " tokens"]
    """The tokens up to here spell the text, so `ends` can be trusted."""
    next_is_eos: Bool[np.ndarray, " tokens"]
    """EOS comes next."""
    next_has_blank: Bool[np.ndarray, " tokens"]
    """The next token spells the blank that the tokenizer added before the text."""
    has_next: Bool[np.ndarray, " tokens"]
    """A token of the same row comes next, and it spells bytes or is EOS."""

    @property
    def can_match(self) -> Bool[np.ndarray, " tokens"]:
        """Positions that say something of the text, at a byte that is known."""
        return self.is_placed & self.has_next


def spell_vocabulary(tokenizer: TextTokenizer) -> SpelledVocabulary:
    """Return the bytes of a tokenizer's vocabulary as arrays."""
    spelled = [token or b"" for token in tokenizer.token_bytes]
    lengths = np.array([len(token) for token in spelled], dtype=np.int64)
    return SpelledVocabulary(
        lengths=lengths,
        starts=np.cumsum(lengths) - lengths,
        blob=np.frombuffer(b"".join(spelled), dtype=np.uint8),
        adds_blank=tokenizer.adds_blank,
        eos_id=tokenizer.eos_id,
        start_id=tokenizer.start_id,
    )


def row_starts(num_bytes: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    """Return where each row begins in the shard's bytes, one byte of gap between rows."""
    return np.cumsum(num_bytes + 1) - (num_bytes + 1)


def place_tokens(
    ids: Int[np.ndarray, " tokens"],
    offsets: Int[np.ndarray, " rows_plus_1"],
    texts: Sequence[bytes],
    vocabulary: SpelledVocabulary,
) -> PlacedTokens:
    """Return where each token of a shard ends, checked against the rows' own bytes.

    Args:
        ids: All rows' tokens: start token, text and EOS.
        offsets: Where each row's tokens begin, and the end of the last.
        texts: The rows' UTF-8 bytes.
        vocabulary: What the tokens spell.
    """
    num_rows = len(texts)
    rows = np.repeat(np.arange(num_rows), np.diff(offsets))
    lengths = vocabulary.lengths[ids].copy()
    blank_at = _find_added_blanks(ids, offsets, lengths, vocabulary)
    lengths[blank_at] -= 1
    num_bytes = np.array([len(text) for text in texts], dtype=np.int64)
    starts = row_starts(num_bytes)
    totals = np.concatenate([[0], np.cumsum(lengths)])
    ends_in_row = totals[1:] - np.repeat(totals[offsets[:-1]], np.diff(offsets))
    trusted = _count_right_bytes(ids, offsets, texts, vocabulary, lengths, blank_at)
    is_last = np.zeros(len(ids), dtype=bool)
    is_last[offsets[1:][np.diff(offsets) > 0] - 1] = True
    next_ids = np.append(ids[1:], -1)
    next_is_eos = ~is_last & (next_ids == (-1 if vocabulary.eos_id is None else vocabulary.eos_id))
    next_has_blank = np.zeros(len(ids), dtype=bool)
    next_has_blank[blank_at[(blank_at > 0)] - 1] = True
    next_has_blank &= ~is_last
    spells_next = np.append(lengths[1:], 0) > 0
    return PlacedTokens(
        ids=ids,
        ends=starts[rows] + np.minimum(ends_in_row, num_bytes[rows]),
        is_placed=ends_in_row <= trusted[rows],
        next_is_eos=next_is_eos,
        next_has_blank=next_has_blank,
        has_next=~is_last & (spells_next | next_is_eos),
    )


def _find_added_blanks(
    ids: np.ndarray, offsets: np.ndarray, lengths: np.ndarray, vocabulary: SpelledVocabulary
) -> Int[np.ndarray, " rows"]:
    """Return the tokens that spell a blank the text does not have: each row's first of text."""
    if not vocabulary.adds_blank or not len(ids):
        return np.zeros(0, dtype=np.int64)
    firsts = offsets[:-1][np.diff(offsets) > 0]
    begins_with_special = lengths[firsts] == 0
    at = firsts + begins_with_special
    at = at[at < len(ids)]
    blank = ord(" ")
    spells_blank = (lengths[at] > 0) & (
        vocabulary.blob[np.minimum(vocabulary.starts[ids[at]], len(vocabulary.blob) - 1)] == blank
    )
    return at[spells_blank]


def _count_right_bytes(
    ids: np.ndarray,
    offsets: np.ndarray,
    texts: Sequence[bytes],
    vocabulary: SpelledVocabulary,
    lengths: np.ndarray,
    blank_at: np.ndarray,
) -> Int[np.ndarray, " rows"]:
    """Return for each row how many bytes its tokens spell before the first that is wrong."""
    skipped = np.zeros(len(ids), dtype=np.int64)
    skipped[blank_at] = 1
    out_starts = np.cumsum(lengths) - lengths
    index = np.arange(int(lengths.sum()))
    index += np.repeat(vocabulary.starts[ids] + skipped - out_starts, lengths)
    spelled = vocabulary.blob[index].tobytes()
    bounds = np.concatenate([[0], np.cumsum(lengths)])[offsets]
    return np.array(
        [
            _common_prefix(spelled[bounds[row] : bounds[row + 1]], text)
            for row, text in enumerate(texts)
        ],
        dtype=np.int64,
    )


def _common_prefix(left: bytes, right: bytes) -> int:
    if left == right:
        return len(right)
    length = min(len(left), len(right))
    differs = np.frombuffer(left[:length], np.uint8) != np.frombuffer(right[:length], np.uint8)
    return int(differs.argmax()) if differs.any() else length
