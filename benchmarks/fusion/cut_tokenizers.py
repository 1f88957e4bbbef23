"""Real tokenizers truncated to their first merges.

A full vocabulary would make most of a tiny model's parameters. A truncated tokenizer is the same
tokenizer at an earlier point of its own training: the same normalizer, the same pre-tokenizer, the
same merges in the same order, only fewer. Its ids are renumbered.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from rayfuse.demo.tiny_tokenizers import save_tokenizer
from rayfuse.models.token_bytes import BYTE_PATTERN, SPACE_MARK

SINGLE_SHARE = 8
"""At most 1 / SINGLE_SHARE of the entries are single characters (SentencePiece); other characters
are spelled by their bytes."""


def cut_tokenizer(source: Path, folder: Path, texts: Iterable[str], vocab_size: int) -> None:
    """Save a tokenizer that has the first merges of a real one.

    Args:
        source: The real tokenizer's folder.
        folder: Folder of the truncated one.
        texts: Texts that decide which characters a SentencePiece vocabulary keeps.
        vocab_size: Number of entries, special tokens and bytes included.
    """
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    cut = _cut_content(content, texts, vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(Tokenizer.from_str(json.dumps(cut)), folder)


def _cut_content(content: dict[str, Any], texts: Iterable[str], vocab_size: int) -> dict[str, Any]:
    model = content["model"]
    merges = [_split_merge(merge) for merge in model["merges"]]
    by_id = sorted(model["vocab"], key=model["vocab"].__getitem__)
    added = {token["content"]: token for token in content["added_tokens"]}
    specials = [name for name, token in added.items() if token["special"]]
    if model["byte_fallback"]:
        kept = [*specials, *(token for token in by_id if BYTE_PATTERN.fullmatch(token))]
        kept += _choose_characters(by_id, texts, vocab_size // SINGLE_SHARE)
    else:
        kept = [*specials, *(token for token in by_id if len(token) == 1)]
    # GPT-NeoX's runs of spaces are added tokens outside the model, which have the last ids.
    last = [name for name in added if name not in model["vocab"]]
    vocabulary = dict.fromkeys(name for name in kept if name not in last)
    for left, right in merges:
        # SentencePiece lists a token's merges before those of its parts where these are rarer.
        if left + right in vocabulary or (left in vocabulary and right in vocabulary):
            vocabulary.setdefault(left + right)
        if len(vocabulary) + len(last) >= vocab_size:
            break
    numbers = {token: number for number, token in enumerate([*vocabulary, *last])}
    kept_merges = [
        f"{left} {right}"
        for left, right in merges
        if left in numbers and right in numbers and left + right in numbers
    ]
    in_model = {token: number for token, number in numbers.items() if token in model["vocab"]}
    tokens = [token | {"id": numbers[name]} for name, token in added.items()]
    return content | {
        "model": model | {"vocab": in_model, "merges": kept_merges},
        "added_tokens": sorted(tokens, key=lambda token: token["id"]),
        "post_processor": None,
    }


def _split_merge(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _choose_characters(tokens: list[str], texts: Iterable[str], limit: int) -> list[str]:
    """Choose the vocabulary's characters that are most frequent in the texts."""
    singles = {token for token in tokens if len(token) == 1}
    counts = Counter(char for text in texts for char in text.replace(" ", SPACE_MARK))
    found = [char for char, _ in counts.most_common() if char in singles]
    return found[:limit]
