"""Distributions inside source tokens by definition, in plain loops over one row."""

import numpy as np

from rayfuse.align.inside_map import CONTINUATIONS
from rayfuse.models.tokenizer import TextTokenizer


def tokenize_inside(text: bytes, tokenizer: TextTokenizer) -> list[tuple[int, bytes]]:
    """Tokenize as in the middle of a text: behind a line end, whose tokens are dropped.

    Nothing where the line end is joined to the text.
    """
    before = "\n" if tokenizer.adds_prefix_space else ""
    (ids,) = tokenizer.encode([before + text.decode("utf-8", errors="replace")])
    pieces = [(i, tokenizer.token_bytes[i] or b"") for i in ids.tolist()]
    done = b""
    while before and pieces and done != b" \n":
        done += pieces.pop(0)[1]
    return pieces


def goal_of(token: bytes, cut: int, source: TextTokenizer, target: TextTokenizer) -> int | str:
    """Find the target token at a byte of a source token, by definition."""
    texts = [token]
    if token[-1:].isspace():
        texts = [
            token + after
            for after in CONTINUATIONS
            if [piece for _, piece in tokenize_inside(token + after, source)[:1]] == [token]
        ]
    found: set[int | str] = set()
    for text in texts:
        at, goal = 0, "ruled out"
        pieces = tokenize_inside(text, target)
        for piece, piece_bytes in pieces:
            if at == cut:
                goal = piece if at + len(piece_bytes) <= len(token) else "unknown"
            at += len(piece_bytes)
        found.add(goal if b"".join(piece for _, piece in pieces) == text else "unknown")
    return found.pop() if len(found) == 1 else "unknown"


def place_plainly(ids: list[int], tokenizer: TextTokenizer, text: bytes) -> list[int]:
    """Return where each token ends; a prefix space is before the text."""
    spelled = b"".join(tokenizer.token_bytes[i] or b"" for i in ids)
    extra = len(spelled) - len(text)
    assert spelled[extra:] == text
    ends = np.cumsum([len(tokenizer.token_bytes[i] or b"") for i in ids]) - extra
    return np.maximum(ends, 0).tolist()


def expect_row(
    row: dict, source: TextTokenizer, target: TextTokenizer
) -> dict[int, tuple[dict[int, float], float]]:
    """Compute masses of target tokens and of the tail by position, with plain loops."""
    text = row["text"].encode()
    ends, target_ends = (
        place_plainly(row[ids], tokenizer, text)
        for ids, tokenizer in (("source_ids", source), ("target_ids", target))
    )
    expected = {}
    first = 1 if target.adds_prefix_space else 0  # its first token spells more than the text
    target_starts = target_ends[first:-1]
    for at in range(first, len(target_ends) - 1):
        byte = target_ends[at]
        covering = [i for i in range(1, len(ends)) if ends[i - 1] < byte < ends[i]]
        if not covering or (covering[0] == 1 and source.adds_prefix_space):
            continue
        source_at = covering[0] - 1
        start = ends[source_at]
        if start not in target_starts:
            continue
        begun = text[start:byte]
        masses: dict[int, float] = {}
        tail, num_others = 0.0, 0
        head, probs = row["top_ids"][source_at], row["top_probs"][source_at]
        for token_id, token in enumerate(source.token_bytes):
            if not token or not token.startswith(begun):
                continue
            goal = "unknown" if token == begun else goal_of(token, len(begun), source, target)
            if goal == "ruled out":
                continue
            if token_id not in head:
                num_others += 1
                continue
            prob = float(probs[head.index(token_id)])
            if isinstance(goal, int):
                masses[goal] = masses.get(goal, 0.0) + prob
            else:
                tail += prob
        tail += min(row["tail"][source_at], num_others * min(probs))
        expected[at] = masses, tail
    return expected
