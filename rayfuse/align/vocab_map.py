"""Source vocabulary -> target vocabulary: which target token each source token's mass goes to."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from rayfuse.models.tokenizer import TextTokenizer

ANCHOR = "\n"
"""Put before a text to keep a tokenizer from adding a blank to it."""

PLAIN, UNBLANKED, BLANKED = 0, -1, 1
"""Which of a vocabulary's three maps: tokens as they are spelled; without their leading blank,
where the source adds one to the text and the target does not; with one more, the other way round.
As indices they are right, -1 being the last of three."""

NEAREST_CHUNK = 256
"""Source tokens compared with the whole target vocabulary at a time: 64 MB for 64,000 tokens."""

FIRST_LEAD_BYTE = 0xC0
"""From here on a byte begins a character of several; those from 0x80 on go on with one (UTF-8)."""

VocabMaps = Int[np.ndarray, "3 source_vocab_plus_1"]
"""Target ids, -1 for the tail; the last column is for id -1, which is no entry."""


def map_vocabulary(
    source: TextTokenizer, target: TextTokenizer, *, only_equal: bool = False
) -> VocabMaps:
    """Return for each source id the target id that its mass goes to, for the methods by bytes.

    A source token goes to the target token with the same bytes; failing that, to the first token
    of the target's own tokenisation of those bytes. Where a token ends inside a character, nobody
    knows which one: it goes to the tail, unless the target's token is the same whatever follows.
    EOS goes to EOS; other special tokens have no counterpart.

    Args:
        source: The tokenizer mapped from.
        target: The tokenizer mapped to.
        only_equal: Map only tokens with the same bytes (the method `exact`).
    """
    spelled = [token or b"" for token in source.token_bytes]
    maps = np.full((3, source.vocab_size + 1), -1, dtype=np.int32)
    by_bytes, is_byte = target.list_by_bytes(), target.byte_ids()
    namesakes = list(_list_namesakes(source, target))
    for view in (PLAIN, UNBLANKED, BLANKED):
        if not _is_view_used(view, source, target):
            maps[view] = maps[PLAIN]
            continue
        tokens = [_change_blank(token, view) for token in spelled]
        mapped = np.array([by_bytes.get(token, -1) for token in tokens], dtype=np.int32)
        unmatched = [i for i in np.flatnonzero(mapped < 0).tolist() if tokens[i]]
        if not only_equal:
            mapped[unmatched] = _first_tokens([tokens[i] for i in unmatched], target, by_bytes)
        for i in np.flatnonzero(mapped >= 0).tolist():
            goal = target.token_bytes[mapped[i]] or b""
            if not _is_certain(tokens[i], goal, is_byte=bool(is_byte[mapped[i]])):
                mapped[i] = -1
        for token_id, goal in namesakes:
            if tokens[token_id] == spelled[token_id]:
                mapped[token_id] = goal
        maps[view, :-1] = mapped
    return _map_roles(maps, source, target)


def _is_certain(token: bytes, goal: bytes, *, is_byte: bool) -> bool:
    """Return whether a target begins with a token whatever character the source's goes on with.

    Byte tokens join no others; but where a character begins, a target has them only for characters
    that have no token of their own.
    """
    unfinished = find_unfinished(token)
    if unfinished == len(token) or (is_byte and token[0] < FIRST_LEAD_BYTE):
        return True
    return len(goal) < unfinished or (goal == token and not is_byte)


def find_unfinished(token: bytes) -> int:
    """Return where a character begins that a token does not finish; its length if there is none."""
    for start in range(max(len(token) - 3, 0), len(token)):
        lead = token[start]
        if lead >= FIRST_LEAD_BYTE and len(token) - start < 2 + (lead >= 0xE0) + (lead >= 0xF0):
            return start
    return len(token)


def _is_view_used(view: int, source: TextTokenizer, target: TextTokenizer) -> bool:
    """Return whether a blank is ever to be taken off or put on: it takes long to map for that."""
    ours, theirs = (
        (each.adds_prefix_space, each.implies_prefix_space) for each in (source, target)
    )
    if view == PLAIN:
        return True
    return ours != theirs and any(ours if view == UNBLANKED else theirs)


def _change_blank(token: bytes, view: int) -> bytes:
    if view == UNBLANKED:
        return token.removeprefix(b" ")
    return b" " + token if token and view == BLANKED else token


def build_maps(
    plain: Int[np.ndarray, " source_vocab"], source: TextTokenizer, target: TextTokenizer
) -> VocabMaps:
    """Return the maps of a method that knows but one: the same wherever blanks are added."""
    maps = np.full((3, source.vocab_size + 1), -1, dtype=np.int32)
    maps[:, :-1] = plain
    return _map_roles(maps, source, target)


def map_to_nearest(
    token_ids: Sequence[int], source: TextTokenizer, target: TextTokenizer
) -> Int[np.ndarray, " tokens"]:
    """Return the target token at the least edit distance from each source token
    (`min_edit_distance`).

    The distance is Levenshtein's, over the bytes that tokens spell; ties go to the lowest id, but
    never to a byte token whose byte another token spells too. FuseLLM's MinED, section 3.2 of arXiv
    2401.10491. Tokens that spell nothing are mapped to -1.
    """
    by_bytes = target.list_by_bytes()
    goals = sorted(by_bytes, key=by_bytes.__getitem__)  # by id: the first of equals is the lowest
    goal_ids = np.array([by_bytes[goal] for goal in goals], dtype=np.int32)
    spelled = [source.token_bytes[token_id] or b"" for token_id in token_ids]
    namesakes = dict(_list_namesakes(source, target))
    mapped = np.array(
        [
            namesakes.get(token_id, by_bytes.get(piece, -1))
            for token_id, piece in zip(token_ids, spelled, strict=True)
        ],
        dtype=np.int32,
    )
    todo = [i for i in np.flatnonzero(mapped < 0).tolist() if spelled[i]]
    for start in range(0, len(todo), NEAREST_CHUNK):
        part = todo[start : start + NEAREST_CHUNK]
        distances = cdist(
            [spelled[i] for i in part], goals, scorer=Levenshtein.distance, dtype=np.int32
        )
        mapped[part] = goal_ids[distances.argmin(axis=1)]
    return mapped


def _list_namesakes(source: TextTokenizer, target: TextTokenizer) -> Iterator[tuple[int, int]]:
    """Yield source and target ids of one name that spell the same bytes.

    Where a vocabulary has several tokens of the same bytes, as a blank and the byte 0x20, the name
    tells which is which.
    """
    by_name = {name: token_id for token_id, name in enumerate(target.token_names) if name}
    for token_id, spelled in enumerate(source.token_bytes):
        goal = by_name.get(source.token_names[token_id])
        if spelled and goal is not None and target.token_bytes[goal] == spelled:
            yield token_id, goal


def _map_roles(maps: VocabMaps, source: TextTokenizer, target: TextTokenizer) -> VocabMaps:
    """Map the tokens that spell nothing: EOS to EOS, BOS to BOS, all others to the tail.

    A tokenizer's own tokens are all mapped to themselves.
    """
    if source.content_hash == target.content_hash:
        maps[PLAIN, :-1] = np.where(source.known_ids(), np.arange(source.vocab_size), -1)
    if source.start_id is not None and target.start_id is not None:
        maps[:, source.start_id] = target.start_id
    if source.eos_id is not None:  # after BOS: where one token is both, it is the end that is meant
        maps[:, source.eos_id] = -1 if target.eos_id is None else target.eos_id
    return maps


def _first_tokens(
    texts: Sequence[bytes], target: TextTokenizer, by_bytes: dict[bytes, int]
) -> list[int]:
    """Return the first token of the target's tokenisation of each text, as inside a longer text."""
    anchor = ANCHOR if target.adds_prefix_space else ""
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
