"""Alignment by plain Python loops over one row, to compare with; nothing here is rayfuse's."""

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

LOSSY = ("t5-small", "bert-base-uncased")
BYTE_LEVEL = ("gpt2", "gpt-neox-20b")
START_AND_EOS = {  # what stands before a row, and after one that ends a document
    "gpt2": (True, True),
    "gpt-neox-20b": (True, True),
    "mistral-7b": (True, True),
    "open-llama-3b": (True, True),
    "phi-3-mini": (True, True),
    "stories260k": (True, True),
    "t5-small": (True, True),
    "bert-base-uncased": (False, False),
}


@dataclass
class PlainRow:
    """One row's tokens of text: where each ends, in bytes, and whether it spells its bytes."""

    ends: list[int]
    is_right: list[bool]
    has_blank: list[bool]  # it spells a leading blank that the text does not have


def read_tokenizer(folder: Path) -> Tokenizer:
    """Load a tokenizer that reads every marker in a text as text."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = None  # it trims blanks off offsets
    for added in content["added_tokens"]:
        added["special"] |= added["content"].startswith("<") and added["content"].endswith(">")
        if "unk_id" in content["model"]:  # unigram, else it spells "<pad>" with its control token
            added["content"] = content["model"]["vocab"][added["id"]][0] = f"{added['content']} "
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True
    return tokenizer


def byte_of_sign() -> dict[str, int]:
    """ShardSpan out GPT-2's alphabet."""
    signs, spare = {}, 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            signs[chr(byte)] = byte
        else:
            signs[chr(spare)] = byte
            spare += 1
    return signs


SIGNS = byte_of_sign()


def spell(name: str, token: str) -> bytes:
    """Return the bytes of a token's entry."""
    if name in BYTE_LEVEL:
        return b"".join(bytes([SIGNS[c]]) if c in SIGNS else c.encode() for c in token)
    if name == "bert-base-uncased":
        return token[2:].encode() if token.startswith("##") else b" " + token.encode()
    if name != "t5-small" and token.startswith("<0x") and len(token) == 6 and token[5] == ">":
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def place_plainly(name: str, tokenizer: Tokenizer, text: str) -> PlainRow:
    """Return where a text's tokens end: by what they spell, else by the tokenizer's offsets."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    tokens = [tokenizer.id_to_token(token_id) for token_id in encoding.ids]  # not the text's own
    spelled = [spell(name, token) for token in tokens]
    adds_prefix_space = name not in (*BYTE_LEVEL, "bert-base-uncased")
    data = text.encode()
    added = 1 if adds_prefix_space and spelled and spelled[0].startswith(b" ") else 0
    if b"".join(spelled)[added:] == data:
        ends, done = [], -added
        for piece in spelled:
            done += len(piece)
            ends.append(done)
        return PlainRow(ends, [True] * len(ends), [bool(added)] + [False] * (len(ends) - 1))
    shared = place_shared(text, encoding.offsets, spelled)
    ends, is_right, has_blank, done = [], [], [], 0
    unknown = {"[UNK]", "<unk>", "</s>", "<pad>"}  # a unigram model may find its own controls
    offsets = [*encoding.offsets, (len(text), len(text))]
    for at, (token, piece) in enumerate(zip(tokens, spelled, strict=True)):
        begin, end = (len(text[:char].encode()) for char in offsets[at])
        next_begin = len(text[: offsets[at + 1][0]].encode())
        begin, end = shared.get(at, (begin, min(end, next_begin)))
        end = max(done, end)
        covered = data[done:end]
        may_add = name == "bert-base-uncased" or (at == 0 and adds_prefix_space)
        has_extra = may_add and piece == b" " + covered
        is_complete = begin >= done and (covered or has_extra)
        is_right.append(token not in unknown and is_complete and (piece == covered or has_extra))
        has_blank.append(has_extra and is_right[-1])
        ends.append(end)
        done = end
    return PlainRow(ends, is_right, has_blank)


def place_shared(
    text: str, offsets: list[tuple[int, int]], spelled: list[bytes]
) -> dict[int, tuple[int, int]]:
    """Return the bytes of tokens that share characters, where together they spell these."""
    found, at = {}, 0
    while at < len(offsets):
        stop, reach = at + 1, offsets[at][1]
        while stop < len(offsets) and offsets[stop][0] < reach:
            reach = max(reach, offsets[stop][1])
            stop += 1
        if stop > at + 1 and b"".join(spelled[at:stop]) == text[offsets[at][0] : reach].encode():
            begin = len(text[: offsets[at][0]].encode())
            for index in range(at, stop):
                found[index] = (begin, begin + len(spelled[index]))
                begin += len(spelled[index])
        at = stop
    return found


def count_signals(source_name: str, source: PlainRow, target_name: str, target: PlainRow) -> int:
    """Count the target tokens of a document's row that a source position speaks of."""
    starts_at: dict[tuple[int, bool], int] = {}
    for index, has_blank in enumerate(source.has_blank):
        if index or START_AND_EOS[source_name][0]:
            starts_at[source.ends[index - 1] if index else 0, has_blank] = index
    count = 0
    for index, end in enumerate(target.ends):
        if index == 0 and not START_AND_EOS[target_name][0]:
            continue
        begin = target.ends[index - 1] if index else 0
        has_blank = target.has_blank[index]
        at = starts_at.get((begin, has_blank), starts_at.get((begin, not has_blank)))
        if at is None or not target.is_right[index]:
            continue
        sound = source.is_right[at]
        while sound and source.ends[at] < end and at + 1 < len(source.ends):
            at += 1
            sound = source.is_right[at]
        count += sound and source.ends[at] >= end  # the end of the text may be left out
    both_end = START_AND_EOS[source_name][1] and START_AND_EOS[target_name][1]
    same_end = bool(source.ends) and bool(target.ends) and source.ends[-1] == target.ends[-1]
    return count + (both_end and same_end)
