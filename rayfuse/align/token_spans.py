"""Where tokens end in the text, for all rows of a shard at once.

The rows of a shard are laid out as one long text with a gap of one byte between rows, so that a
byte's number says which row it is in and one search serves the whole shard.
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
    """Why a token cannot be placed: what a model says of it is not about the text's own bytes."""

    NONE = 0
    CHANGED_TEXT = 1
    """It spells other bytes than the text has there: case, accents, blanks, Unicode forms."""
    INSIDE_CHARACTER = 2
    """It begins inside a character of the text that the tokenizer took apart and changed."""
    UNKNOWN_TOKEN = 3
    """It stands for text that the vocabulary cannot spell."""
    DROPPED_TEXT = 4
    """It is missing: the tokenizer leaves out the end of the text."""

    @property
    def reason(self) -> str:
        """Return the fault as a report says it."""
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
    """The first token of a text spells a blank that the text does not have."""
    eos_id: int | None
    start_id: int | None
    tokenizer: TextTokenizer | None
    """Asked for offsets where tokens do not spell their text; None for vocabularies that always
    do."""

    def spell(self, token_id: int) -> bytes:
        """Return one token's bytes."""
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
    """The byte after the last one a token spells: what the model says at the token starts there.
    Never decreases."""
    faults: UInt8[np.ndarray, " tokens"]
    """`Fault` of the next token: with any, the model speaks of other text than the row has."""
    next_is_eos: Bool[np.ndarray, " tokens"]
    """EOS comes next."""
    next_has_blank: Bool[np.ndarray, " tokens"]
    """The next token spells a leading blank that the text does not have there."""
    has_next: Bool[np.ndarray, " tokens"]
    """A token of the same row comes next."""
    dropped: Int[np.ndarray, "gaps 2"]
    """Ends of rows that no token spells: each from its first byte to the byte after its last."""

    @property
    def can_match(self) -> Bool[np.ndarray, " tokens"]:
        """Positions that say something of the text, at a byte that is known."""
        return self.has_next & (self.faults == Fault.NONE)


def list_token_bytes(tokenizer: TextTokenizer) -> TokenBytes:
    """Return the bytes of a tokenizer's vocabulary as arrays."""
    spelled = [token or b"" for token in tokenizer.token_bytes]
    lengths = tokenizer.count_bytes()
    return TokenBytes(
        lengths=lengths,
        starts=np.cumsum(lengths) - lengths,
        blob=np.frombuffer(b"".join(spelled), dtype=np.uint8),
        adds_prefix_space=tokenizer.adds_prefix_space,
        eos_id=tokenizer.eos_id,
        start_id=tokenizer.start_id,
        tokenizer=tokenizer,
    )


def row_starts(num_bytes: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    """Return where each row begins in the shard's bytes, one byte of gap between rows."""
    return np.cumsum(num_bytes + 1) - (num_bytes + 1)


def place_tokens(
    ids: Int[np.ndarray, " tokens"],
    offsets: Int[np.ndarray, " rows_plus_1"],
    texts: Sequence[bytes],
    vocabulary: TokenBytes,
    ends_document: Sequence[bool],
) -> PlacedTokens:
    """Return where each token of a shard ends, checked against the rows' own bytes.

    Rows whose tokens spell their text exactly are placed by that alone. Where a tokenizer changes
    its text, its offsets say where tokens end, and each token must still spell the bytes it covers.

    Args:
        ids: All rows' tokens: start token, text and EOS.
        offsets: Where each row's tokens begin, and the end of the last.
        texts: The rows' UTF-8 bytes.
        vocabulary: What the tokens spell.
        ends_document: Which rows end a document, so that their tokens end with EOS.

    Raises:
        ValueError: An id is outside the vocabulary, or a row's tokens are not those of its text.
    """
    _check_ids(ids, offsets, len(vocabulary.lengths))
    num_tokens = np.diff(offsets)
    first_text, has_eos = _find_text_tokens(ids, offsets, vocabulary, np.array(ends_document, bool))
    lengths = vocabulary.lengths[ids]
    has_blank = np.zeros(len(ids), dtype=bool)
    if vocabulary.adds_prefix_space:
        at = first_text[first_text < offsets[1:] - has_eos]
        at = at[lengths[at] > 0]
        has_blank[at[vocabulary.blob[vocabulary.starts[ids[at]]] == SPACE[0]]] = True
        lengths -= has_blank
    ends, is_right = _place_spelled(ids, offsets, texts, vocabulary, lengths, has_blank)
    faults = np.zeros(len(ids), dtype=np.uint8)
    stops = offsets[1:] - has_eos
    changed = np.flatnonzero(~is_right & (num_tokens > 0))
    places = (
        _place_by_offsets([texts[row] for row in changed.tolist()], vocabulary)
        if len(changed)
        else []
    )
    for row, place in zip(changed.tolist(), places, strict=True):
        part = slice(first_text[row], stops[row])
        if not np.array_equal(place.ids, ids[part]):
            raise ValueError(f"row {row}: {_tell_difference(ids[part], place.ids, vocabulary)}")
        ends[part], faults[part], has_blank[part] = place.ends, place.faults, place.has_blank
        ends[stops[row] : offsets[row + 1]] = len(texts[row])
    num_bytes = np.array([len(text) for text in texts], dtype=np.int64)
    starts = row_starts(num_bytes)
    ends += np.repeat(starts, num_tokens)
    spelled = np.array([place.ends[-1] if len(place.ends) else 0 for place in places])
    dropped = np.stack([starts[changed] + spelled, starts[changed] + num_bytes[changed]], axis=1)
    dropped = dropped[dropped[:, 0] < dropped[:, 1]].astype(np.int64)
    # What each position says of the token after it.
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
        next_has_blank=np.append(has_blank[1:], False) & has_next,
        has_next=has_next,
        dropped=dropped,
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
    """Return each row's first token of text, and whether the row ends with EOS.

    Whether it does is known from the corpus alone: a unigram model may spell a literal `</s>` that
    ends a text with the same id.
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


def _tell_difference(
    ours: Int[np.ndarray, " _"], texts: Int[np.ndarray, " _"], vocabulary: TokenBytes
) -> str:
    """Say where a row's tokens first differ from those of its text, some tokens around it."""
    shorter = min(len(ours), len(texts))
    at = int(np.append(np.flatnonzero(ours[:shorter] != texts[:shorter]), shorter)[0])
    around = slice(max(at - 3, 0), at + 4)
    told = [
        f"{part.tolist()} {b''.join(vocabulary.spell(token_id) for token_id in part.tolist())!r}"
        for part in (ours[around], texts[around])
    ]
    return (
        f"its tokens are not those of its text; around token {at} of the text they are {told[0]}, "
        f"the text's are {told[1]}"
    )


def _place_spelled(
    ids: Int[np.ndarray, " tokens"],
    offsets: Int[np.ndarray, " rows_plus_1"],
    texts: Sequence[bytes],
    vocabulary: TokenBytes,
    lengths: Int[np.ndarray, " tokens"],
    has_blank: Bool[np.ndarray, " tokens"],
) -> tuple[Int[np.ndarray, " tokens"], Bool[np.ndarray, " rows"]]:
    """Return where tokens end in their row by what they spell, and which rows they spell right."""
    totals = np.concatenate([[0], np.cumsum(lengths)])
    bounds = totals[offsets]
    ends = totals[1:] - np.repeat(bounds[:-1], np.diff(offsets))
    index = np.arange(totals[-1])
    index += np.repeat(vocabulary.starts[ids] + has_blank - totals[:-1], lengths)
    spelled = vocabulary.blob[index].tobytes()
    is_right = [
        spelled[start:stop] == text
        for start, stop, text in zip(bounds[:-1], bounds[1:], texts, strict=True)
    ]
    return ends, np.array(is_right, dtype=bool)


@dataclass(frozen=True)
class _RowPlace:
    """One row's tokens of text, placed by the tokenizer's offsets."""

    ids: Int[np.ndarray, " tokens"]
    ends: Int[np.ndarray, " tokens"]
    faults: UInt8[np.ndarray, " tokens"]
    has_blank: Bool[np.ndarray, " tokens"]


def _place_by_offsets(texts: Sequence[bytes], vocabulary: TokenBytes) -> list[_RowPlace]:
    """Return rows placed by offsets: text that no token covers belongs to the token after it."""
    tokenizer = vocabulary.tokenizer
    if tokenizer is None:
        raise ValueError("tokens do not spell their text, and there is no tokenizer to ask")
    rows = tokenizer.encode_with_ends([text.decode() for text in texts])
    return [
        _place_row(text, ids, chars, vocabulary, tokenizer.implies_prefix_space)
        for text, (ids, chars) in zip(texts, rows, strict=True)
    ]


def _place_row(
    text: bytes,
    ids: Int[np.ndarray, " tokens"],
    chars: Int[np.ndarray, "tokens 2"],
    vocabulary: TokenBytes,
    implies_prefix_space: bool,
) -> _RowPlace:
    spelled = [vocabulary.spell(token_id) for token_id in ids.tolist()]
    begins, ends = _count_in_bytes(text, chars, spelled)
    faults = np.zeros(len(ids), dtype=np.uint8)
    has_blank = np.zeros(len(ids), dtype=bool)
    done = 0
    for at, piece in enumerate(spelled):
        covered = text[done : ends[at]]
        may_add = implies_prefix_space or (at == 0 and vocabulary.adds_prefix_space)
        has_blank[at] = may_add and piece == SPACE + covered
        if not piece:
            faults[at] = Fault.UNKNOWN_TOKEN
        elif begins[at] < done or not (covered or has_blank[at]):
            faults[at] = Fault.INSIDE_CHARACTER
        elif piece != covered and not has_blank[at]:
            faults[at] = Fault.CHANGED_TEXT
        done = int(ends[at])
    return _RowPlace(ids, ends, faults, has_blank)


def _count_in_bytes(
    text: bytes, chars: Int[np.ndarray, "tokens 2"], spelled: Sequence[bytes]
) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " tokens"]]:
    """Return where each token begins and ends in bytes; ends never decrease.

    Offsets count characters: of tokens that share one they cannot tell where each ends. If what
    these spell is together what their characters are, that tells.
    """
    is_char_start = (np.frombuffer(text, dtype=np.uint8) & 0xC0) != 0x80
    byte_of_char = np.append(np.flatnonzero(is_char_start), len(text))
    begins, stops = byte_of_char[chars[:, 0]], byte_of_char[chars[:, 1]]
    # A blank put before a word is given the word's first character: it ends where that begins.
    ends = np.append(np.minimum(stops[:-1], begins[1:]), stops[-1:])
    for run in _list_sharing(begins, stops):
        if b"".join(spelled[run]) == text[begins[run.start] : stops[run].max()]:
            lengths = np.array([len(piece) for piece in spelled[run]])
            ends[run] = begins[run.start] + np.cumsum(lengths)
            begins[run] = ends[run] - lengths
    return begins, np.maximum.accumulate(ends)


def _list_sharing(
    begins: Int[np.ndarray, " tokens"], stops: Int[np.ndarray, " tokens"]
) -> list[slice]:
    """Return the runs of tokens that share characters with one another."""
    is_first = np.append(True, begins[1:] >= np.maximum.accumulate(stops)[:-1])
    bounds = [*np.flatnonzero(is_first).tolist(), len(begins)]
    return [slice(first, stop) for first, stop in pairwise(bounds) if stop > first + 1]
