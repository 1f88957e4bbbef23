"""Where tokens end in the text, for all rows of a shard at once.

The rows of a shard are laid out as one long text with a gap of one byte between rows, so that a
byte's number determines its row, and one search serves all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Int, UInt8

from rayfuse.models.tokenizer import TextTokenizer

SPACE = b" "


class Fault(IntEnum):
    """Why a token cannot be placed: a prediction of it is not about the text's own bytes."""

    NONE = 0
    CHANGED_TEXT = 1
    """It spells other bytes than the text has there: case, accents, whitespace, Unicode forms."""
    INSIDE_CHARACTER = 2
    """It begins inside a character of the text that the tokenizer took apart and changed."""
    UNKNOWN_TOKEN = 3
    """It stands for text that the vocabulary cannot spell."""
    DROPPED_TEXT = 4
    """It is missing: the tokenizer drops the end of the text."""

    @property
    def reason(self) -> str:
        """Return the fault in the words of a report."""
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of every token, end to end."""

    lengths: Int[np.ndarray, " vocab"]
    """Bytes that each token spells; 0 for special tokens and ids that do not exist."""
    starts: Int[np.ndarray, " vocab"]
    """Where each token's bytes begin in `blob`."""
    blob: UInt8[np.ndarray, " _"]
    """All tokens' bytes."""
    adds_prefix_space: bool
    """The first token of a text spells a prefix space that the text does not have."""
    eos_id: int | None
    start_id: int | None
    tokenizer: TextTokenizer | None
    """Gives offsets where tokens do not spell their text; None for vocabularies that always do."""

    def spell(self, token_id: int) -> bytes:
        """Look up one token's bytes."""
        start = self.starts[token_id]
        return self.blob[start : start + self.lengths[token_id]].tobytes()


@dataclass(frozen=True)
class PlacedTokens:
    """A shard's tokens of one tokenizer, each with its place in the shard's bytes."""

    ids: Int[np.ndarray, " tokens"]
    offsets: Int[np.ndarray, " rows_plus_1"]
    """Where each row's tokens begin, and the end of the last."""
    row_starts: Int[np.ndarray, " rows"]
    """The byte where each row's text begins."""
    ends: Int[np.ndarray, " tokens"]
    """The byte after the last one a token spells: the model's prediction at the token starts there.
    Never decreases."""
    faults: UInt8[np.ndarray, " tokens"]
    """`Fault` of the next token: with any, the model predicts other text than the row has."""
    next_is_eos: Bool[np.ndarray, " tokens"]
    """EOS comes next."""
    next_has_prefix_space: Bool[np.ndarray, " tokens"]
    """The next token spells a prefix space that the text does not have there."""
    has_next: Bool[np.ndarray, " tokens"]
    """A token of the same row comes next."""
    dropped: Int[np.ndarray, "gaps 2"]
    """Ends of rows that no token spells: each from its first byte to the byte after its last."""

    @property
    def can_match(self) -> Bool[np.ndarray, " tokens"]:
        """Positions with a prediction of the text itself, at a byte that is known."""
        return self.has_next & (self.faults == Fault.NONE)


def list_token_bytes(tokenizer: TextTokenizer) -> TokenBytes:
    """Lay out the bytes of a tokenizer's vocabulary as arrays."""
    lengths = tokenizer.count_bytes()
    return TokenBytes(
        lengths=lengths,
        starts=np.cumsum(lengths) - lengths,
        blob=np.frombuffer(
            b"".join(token or b"" for token in tokenizer.token_bytes), dtype=np.uint8
        ),
        adds_prefix_space=tokenizer.adds_prefix_space or tokenizer.is_of_answers,
        eos_id=tokenizer.eos_id,
        start_id=tokenizer.start_id,
        tokenizer=tokenizer,
    )


def row_starts(num_bytes: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    """Place each row in the shard's bytes, with one byte of gap between rows."""
    return np.cumsum(num_bytes + 1) - (num_bytes + 1)


def place_tokens(
    ids: Int[np.ndarray, " tokens"],
    offsets: Int[np.ndarray, " rows_plus_1"],
    texts: Sequence[bytes],
    vocabulary: TokenBytes,
    ends_document: Sequence[bool],
) -> PlacedTokens:
    """Find where each token of a shard ends, and check the tokens against the rows' own bytes.

    Where the tokens of a row spell its text exactly, their lengths place them. Where a tokenizer
    changes its text, its offsets decide where tokens end, and each token is still compared with
    the bytes that it covers.

    Args:
        ids: All rows' tokens: start token, text and EOS.
        offsets: Where each row's tokens begin, and the end of the last.
        texts: The rows' UTF-8 bytes.
        vocabulary: The bytes of the tokens.
        ends_document: True for a row that ends a document, so that its tokens end with EOS.

    Raises:
        ValueError: An id is outside the vocabulary, or a row's tokens are not those of its text.
    """
    _check_ids(ids, offsets, len(vocabulary.lengths))
    num_tokens = np.diff(offsets)
    first_text, has_eos = _find_text_tokens(ids, offsets, vocabulary, np.array(ends_document, bool))
    has_prefix_space = _find_prefix_spaces(
        ids, first_text[first_text < offsets[1:] - has_eos], vocabulary
    )
    lengths = vocabulary.lengths[ids] - has_prefix_space
    ends, is_right = _place_by_bytes(ids, offsets, texts, vocabulary, lengths, has_prefix_space)
    faults = np.zeros(len(ids), dtype=np.uint8)
    row_ends = np.array([len(text) for text in texts], dtype=np.int64)
    covered_ends = row_ends.copy()
    for row in _place_changed_rows(np.flatnonzero(~is_right & (num_tokens > 0)), texts, vocabulary):
        stop = offsets[row.number + 1] - has_eos[row.number]
        part = slice(first_text[row.number], stop)
        if not np.array_equal(row.ids, ids[part]):
            difference = _describe_difference(ids[part], row.ids, vocabulary)
            raise ValueError(f"row {row.number}: {difference}")
        ends[part], faults[part], has_prefix_space[part] = (
            row.ends,
            row.faults,
            row.has_prefix_space,
        )
        ends[stop : offsets[row.number + 1]] = row_ends[row.number]
        covered_ends[row.number] = row.ends[-1] if len(row.ends) else 0
    starts = row_starts(row_ends)
    ends += np.repeat(starts, num_tokens)
    dropped = np.stack([starts + covered_ends, starts + row_ends], axis=1)
    # The position before a token predicts it: move what is known of each token there.
    has_next = np.ones(len(ids), dtype=bool)
    has_next[offsets[1:][num_tokens > 0] - 1] = False
    next_is_eos = np.zeros(len(ids), dtype=bool)
    next_is_eos[offsets[1:][has_eos & (num_tokens > 1)] - 2] = True
    return PlacedTokens(
        ids=ids,
        offsets=offsets,
        row_starts=starts,
        ends=ends,
        faults=np.append(faults[1:], np.uint8(0)) * has_next,
        next_is_eos=next_is_eos,
        next_has_prefix_space=np.append(has_prefix_space[1:], False) & has_next,
        has_next=has_next,
        dropped=dropped[covered_ends < row_ends],
    )


def _check_ids(
    ids: Int[np.ndarray, " tokens"], offsets: Int[np.ndarray, " rows_plus_1"], vocab_size: int
) -> None:
    wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(wrong):
        row = int(np.searchsorted(offsets, wrong[0], side="right")) - 1
        raise ValueError(
            f"row {row}, position {wrong[0] - offsets[row]}: token {ids[wrong[0]]} is outside the "
            f"vocabulary of {vocab_size}"
        )


def _find_text_tokens(
    ids: Int[np.ndarray, " tokens"],
    offsets: Int[np.ndarray, " rows_plus_1"],
    vocabulary: TokenBytes,
    ends_document: Bool[np.ndarray, " rows"],
) -> tuple[Int[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
    """Find each row's first token of text, and the rows that end with EOS.

    Only the corpus decides which rows do: a unigram model may spell a literal `</s>` that ends a
    text with the same id.
    """
    num_tokens = np.diff(offsets)
    has_start = (num_tokens > 0) & (vocabulary.start_id is not None)
    has_eos = (num_tokens > 0) & ends_document & (vocabulary.eos_id is not None)
    firsts, lasts = offsets[:-1][has_start], offsets[1:][has_eos] - 1
    is_wrong = num_tokens < has_start.astype(int) + has_eos
    is_wrong[has_start] |= ids[firsts] != vocabulary.start_id
    is_wrong[has_eos] |= ids[lasts] != vocabulary.eos_id
    if is_wrong.any():
        row = int(np.flatnonzero(is_wrong)[0])
        own = ids[offsets[row] : offsets[row + 1]]
        start, eos = vocabulary.start_id, vocabulary.eos_id if has_eos[row] else None
        raise ValueError(
            f"row {row}: its tokens begin {own[:5].tolist()} and end {own[-5:].tolist()}, but this "
            f"tokenizer's begin with {start} and end, here, with {'text' if eos is None else eos}"
        )
    return offsets[:-1] + has_start, has_eos


def _find_prefix_spaces(
    ids: Int[np.ndarray, " tokens"], first_text: Int[np.ndarray, " rows"], vocabulary: TokenBytes
) -> Bool[np.ndarray, " tokens"]:
    """Find the tokens that spell a space which their tokenizer has put before the text."""
    has_prefix_space = np.zeros(len(ids), dtype=bool)
    if vocabulary.adds_prefix_space:
        at = first_text[vocabulary.lengths[ids[first_text]] > 0]
        has_prefix_space[at[vocabulary.blob[vocabulary.starts[ids[at]]] == SPACE[0]]] = True
    return has_prefix_space


def _describe_difference(
    ours: Int[np.ndarray, " _"], texts: Int[np.ndarray, " _"], vocabulary: TokenBytes
) -> str:
    """Describe where a row's tokens first differ from those of its text, with tokens around it."""
    shorter = min(len(ours), len(texts))
    at = int(np.append(np.flatnonzero(ours[:shorter] != texts[:shorter]), shorter)[0])
    around = slice(max(at - 3, 0), at + 4)
    shown = [
        f"{part.tolist()} {b''.join(vocabulary.spell(token_id) for token_id in part.tolist())!r}"
        for part in (ours[around], texts[around])
    ]
    return (
        f"its tokens are not those of its text; around token {at} of the text they are {shown[0]}, "
        f"the text's are {shown[1]}"
    )


def _place_by_bytes(
    ids: Int[np.ndarray, " tokens"],
    offsets: Int[np.ndarray, " rows_plus_1"],
    texts: Sequence[bytes],
    vocabulary: TokenBytes,
    lengths: Int[np.ndarray, " tokens"],
    has_prefix_space: Bool[np.ndarray, " tokens"],
) -> tuple[Int[np.ndarray, " tokens"], Bool[np.ndarray, " rows"]]:
    """Place tokens in their row by their bytes, and find the rows that they spell exactly."""
    totals = np.concatenate([[0], np.cumsum(lengths)])
    bounds = totals[offsets]
    ends = totals[1:] - np.repeat(bounds[:-1], np.diff(offsets))
    # One gather joins the bytes of all tokens of the shard: index i is a token's place in the blob
    # plus the distance of byte i from the token's first.
    index = np.arange(totals[-1])
    index += np.repeat(vocabulary.starts[ids] + has_prefix_space - totals[:-1], lengths)
    joined = vocabulary.blob[index].tobytes()
    is_right = [
        joined[start:stop] == text
        for start, stop, text in zip(bounds[:-1], bounds[1:], texts, strict=True)
    ]
    return ends, np.array(is_right, dtype=bool)


@dataclass(frozen=True)
class _PlacedRow:
    """One row's tokens of text, placed by the tokenizer's offsets."""

    number: int
    ids: Int[np.ndarray, " tokens"]
    ends: Int[np.ndarray, " tokens"]
    faults: UInt8[np.ndarray, " tokens"]
    has_prefix_space: Bool[np.ndarray, " tokens"]


def _place_changed_rows(
    rows: Int[np.ndarray, " changed"], texts: Sequence[bytes], vocabulary: TokenBytes
) -> list[_PlacedRow]:
    """Place rows by offsets: text that no token covers belongs to the token after it."""
    if not len(rows):
        return []
    tokenizer = vocabulary.tokenizer
    if tokenizer is None:
        raise ValueError("tokens do not spell their text, and no tokenizer is known for offsets")
    own = [texts[row] for row in rows.tolist()]
    encoded = tokenizer.encode_with_ends([text.decode() for text in own])
    return [
        _place_row(number, text, ids, chars, vocabulary, tokenizer)
        for number, text, (ids, chars) in zip(rows.tolist(), own, encoded, strict=True)
    ]


def _place_row(
    number: int,
    text: bytes,
    ids: Int[np.ndarray, " tokens"],
    chars: Int[np.ndarray, "tokens 2"],
    vocabulary: TokenBytes,
    tokenizer: TextTokenizer,
) -> _PlacedRow:
    token_bytes = [vocabulary.spell(token_id) for token_id in ids.tolist()]
    # Some tokenizers insert a space also after each added token of the text; the unknown token,
    # which spells nothing, stands for other text.
    is_added = [
        bool(piece) and tokenizer.token_names[token_id] in tokenizer.added_names
        for token_id, piece in zip(ids, token_bytes, strict=True)
    ]
    begins, ends = _count_in_bytes(text, chars, token_bytes)
    faults = np.zeros(len(ids), dtype=np.uint8)
    has_prefix_space = np.zeros(len(ids), dtype=bool)
    done = 0
    for at, piece in enumerate(token_bytes):
        covered = text[done : ends[at]]
        may_add = tokenizer.implies_prefix_space or (
            tokenizer.adds_prefix_space and (at == 0 or is_added[at - 1])
        )
        has_prefix_space[at] = may_add and piece == SPACE + covered
        if not piece:
            faults[at] = Fault.UNKNOWN_TOKEN
        elif begins[at] < done or not (covered or has_prefix_space[at]):
            faults[at] = Fault.INSIDE_CHARACTER
        elif piece != covered and not has_prefix_space[at]:
            faults[at] = Fault.CHANGED_TEXT
        done = int(ends[at])
    return _PlacedRow(number, ids, ends, faults, has_prefix_space)


def _count_in_bytes(
    text: bytes, chars: Int[np.ndarray, "tokens 2"], token_bytes: Sequence[bytes]
) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " tokens"]]:
    """Convert offsets to bytes: where each token begins and ends. Ends never decrease.

    Offsets count characters, so tokens that share one have equal offsets. If their bytes together
    are the bytes of their characters, their lengths determine where each ends.
    """
    is_char_start = (np.frombuffer(text, dtype=np.uint8) & 0xC0) != 0x80
    byte_of_char = np.append(np.flatnonzero(is_char_start), len(text))
    begins, stops = byte_of_char[chars[:, 0]], byte_of_char[chars[:, 1]]
    # A prefix space is given the offsets of the word's first character: it ends where that begins.
    ends = np.append(np.minimum(stops[:-1], begins[1:]), stops[-1:])
    for run in _list_sharing(begins, stops):
        if b"".join(token_bytes[run]) == text[begins[run.start] : stops[run].max()]:
            lengths = np.array([len(piece) for piece in token_bytes[run]])
            ends[run] = begins[run.start] + np.cumsum(lengths)
            begins[run] = ends[run] - lengths
    return begins, np.maximum.accumulate(ends)


def _list_sharing(
    begins: Int[np.ndarray, " tokens"], stops: Int[np.ndarray, " tokens"]
) -> list[slice]:
    """List the runs of tokens that share characters with one another."""
    is_first = np.append(True, begins[1:] >= np.maximum.accumulate(stops)[:-1])
    bounds = [*np.flatnonzero(is_first).tolist(), len(begins)]
    return [slice(first, stop) for first, stop in pairwise(bounds) if stop > first + 1]
