"""Source vocabulary -> target vocabulary: the target token for each source token's mass."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from rayfuse.models.tokenizer import TextTokenizer

ANCHORS = ("\n", ".")
"""Put before a text to keep a tokenizer from adding a prefix space to it; some drop line ends."""

UNCHANGED, WITHOUT_SPACE, WITH_SPACE = 0, -1, 1
"""A vocabulary's three maps: of tokens as they are; of tokens without their prefix space, where the
source adds one to the text and the target does not; of tokens with one more, in the opposite case.
They are indices of the maps, and at each position the target's prefix spaces minus the source's."""

FIRST_LEAD_BYTE = 0xC0
"""UTF-8: bytes from here on begin a character of several bytes; those from 0x80 on continue one."""

VocabMaps = Int[np.ndarray, "3 source_vocab_plus_1"]
"""Target ids, -1 for the tail; the last column is for id -1, which is no entry."""


def map_vocabulary(
    source: TextTokenizer, target: TextTokenizer, *, only_equal: bool = False
) -> VocabMaps:
    """Map each source id to the target id that its mass goes to, by bytes.

    A source token goes to the target token with the same bytes; failing that, to the first token
    of the target's own tokenization of those bytes. A token that ends inside a character may be
    any of several characters: it goes to the tail, unless the target's token is the same for all
    of them. EOS goes to EOS; other special tokens have no counterpart.

    Args:
        source: The tokenizer mapped from.
        target: The tokenizer mapped to.
        only_equal: Map only tokens with the same bytes (the method `exact`).
    """
    token_bytes = [token or b"" for token in source.token_bytes]
    maps = np.full((3, source.vocab_size + 1), -1, dtype=np.int32)
    by_bytes, is_byte = target.list_by_bytes(), target.byte_ids()
    same_names = list(list_same_names(source, target))
    for space_change in (UNCHANGED, WITHOUT_SPACE, WITH_SPACE):
        if not _is_change_used(space_change, source, target):
            maps[space_change] = maps[UNCHANGED]
            continue
        tokens = [_change_space(token, space_change) for token in token_bytes]
        mapped = np.array([by_bytes.get(token, -1) for token in tokens], dtype=np.int32)
        unmatched = [i for i in np.flatnonzero(mapped < 0).tolist() if tokens[i]]
        if not only_equal:
            mapped[unmatched] = _first_tokens([tokens[i] for i in unmatched], target, by_bytes)
        for i in np.flatnonzero(mapped >= 0).tolist():
            goal = target.token_bytes[mapped[i]] or b""
            if not _is_certain(tokens[i], goal, is_byte=bool(is_byte[mapped[i]])):
                mapped[i] = -1
        for token_id, goal in same_names:
            if tokens[token_id] == token_bytes[token_id]:
                mapped[token_id] = goal
        maps[space_change, :-1] = mapped
    return _map_roles(maps, source, target)


def _is_certain(token: bytes, goal: bytes, *, is_byte: bool) -> bool:
    """Check that the target's tokenization begins with a token however the source's continues.

    Byte tokens join no others; but where a character begins, a target uses them only for characters
    that have no token of their own.
    """
    unfinished = find_unfinished(token)
    if unfinished == len(token) or (is_byte and token[0] < FIRST_LEAD_BYTE):
        return True
    return len(goal) < unfinished or (goal == token and not is_byte)


def find_unfinished(token: bytes) -> int:
    """Find the byte where an unfinished character begins; the token's length if there is none."""
    for start in range(max(len(token) - 3, 0), len(token)):
        lead = token[start]
        if lead >= FIRST_LEAD_BYTE and len(token) - start < 2 + (lead >= 0xE0) + (lead >= 0xF0):
            return start
    return len(token)


def _is_change_used(space_change: int, source: TextTokenizer, target: TextTokenizer) -> bool:
    """Check that a position can need a map; computing one takes seconds.

    Prefix spaces differ only where one of the tokenizers adds them and the other does not, or where
    one's chat template writes a space before an answer.
    """
    of_source, of_target = (
        (side.adds_prefix_space, side.implies_prefix_space) for side in (source, target)
    )
    if space_change == UNCHANGED or source.is_of_answers:
        return True
    return of_source != of_target and any(of_source if space_change == WITHOUT_SPACE else of_target)


def _change_space(token: bytes, space_change: int) -> bytes:
    if space_change == WITHOUT_SPACE:
        return token.removeprefix(b" ")
    return b" " + token if token and space_change == WITH_SPACE else token


def build_maps(
    plain: Int[np.ndarray, " source_vocab"], source: TextTokenizer, target: TextTokenizer
) -> VocabMaps:
    """Build the three maps from one, the same for every prefix space, and map special tokens."""
    maps = np.full((3, source.vocab_size + 1), -1, dtype=np.int32)
    maps[:, :-1] = plain
    return _map_roles(maps, source, target)


def list_same_names(source: TextTokenizer, target: TextTokenizer) -> Iterator[tuple[int, int]]:
    """Yield source and target ids of one name and the same bytes.

    Where a vocabulary has several tokens of the same bytes, as a space and the byte 0x20, only the
    name distinguishes them.
    """
    by_name = {name: token_id for token_id, name in enumerate(target.token_names) if name}
    for token_id, token_bytes in enumerate(source.token_bytes):
        goal = by_name.get(source.token_names[token_id])
        if token_bytes and goal is not None and target.token_bytes[goal] == token_bytes:
            yield token_id, goal


def _map_roles(maps: VocabMaps, source: TextTokenizer, target: TextTokenizer) -> VocabMaps:
    """Map the tokens that spell nothing: EOS to EOS, BOS to BOS, all others to the tail.

    A tokenizer's own tokens are all mapped to themselves.
    """
    if source.content_hash == target.content_hash:
        maps[UNCHANGED, :-1] = np.where(source.known_ids(), np.arange(source.vocab_size), -1)
    if source.start_id is not None and target.start_id is not None:
        maps[:, source.start_id] = target.start_id
    if source.eos_id is not None:  # after BOS: where one token is both, EOS is meant
        maps[:, source.eos_id] = -1 if target.eos_id is None else target.eos_id
    return maps


def _first_tokens(
    texts: Sequence[bytes], target: TextTokenizer, by_bytes: dict[bytes, int]
) -> list[int]:
    """Find the first token of the target's tokenization of each text, as inside a longer text.

    A token that does not begin the text is the target's own if its normalizer changes these
    characters. Bytes that are no complete characters are spelled by byte tokens instead.
    """
    anchor, anchor_ids = find_anchor(target)
    rows = target.encode([anchor + text.decode("utf-8", errors="replace") for text in texts])
    firsts: list[int] = []
    for text, ids in zip(texts, rows, strict=True):
        found = next(iter(take_tokens_after(anchor_ids, ids.tolist())), None)
        token = b"" if found is None else target.token_bytes[found] or b""
        may_change = _is_text(text) and not target.implies_prefix_space
        is_own = bool(token) and (text.startswith(token) or may_change)
        firsts.append(found if is_own and found is not None else _longest_prefix(text, by_bytes))
    return firsts


def find_anchor(target: TextTokenizer) -> tuple[str, list[int]]:
    """Find a text that the target keeps as it is, with its tokens; nothing if it adds no space."""
    if not target.adds_prefix_space:
        return "", []
    for anchor in ANCHORS:
        ids = target.encode([anchor])[0].tolist()
        if b"".join(target.token_bytes[i] or b"" for i in ids) == b" " + anchor.encode():
            return anchor, ids
    return ANCHORS[0], [-1]  # begins no text: no token is known to begin one


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def take_tokens_after(before: list[int], ids: list[int]) -> list[int]:
    """Take the tokens after these, none if the ids begin otherwise."""
    return ids[len(before) :] if ids[: len(before)] == before else []


def _longest_prefix(text: bytes, by_bytes: dict[bytes, int]) -> int:
    """Find the longest token that begins a text: for bytes that are not complete characters."""
    for length in range(len(text), 0, -1):
        if text[:length] in by_bytes:
            return by_bytes[text[:length]]
    return -1
