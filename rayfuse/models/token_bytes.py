"""The bytes of each token of a vocabulary.

A vocabulary writes tokens in the notation of its family (`▁the`, `Ġthe`, `##ing`, `<0x0A>`), which
its files do not name. It is recognised here by the decoder and the model in tokenizer.json.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

SPACE_MARK = "\u2581"
"""The character that SentencePiece writes for a space."""

BYTE_PATTERN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A byte token of SentencePiece: the fallback for characters that have no token."""


def list_token_bytes(
    content: dict[str, Any], names: tuple[str, ...], roles: set[int | None]
) -> tuple[bytes | None, ...]:
    """List the bytes of all tokens, as `TextTokenizer.token_bytes` holds them.

    Args:
        content: The tokenizer.json, with the original names of control tokens.
        names: By id, the token as the vocabulary writes it.
        roles: The ids of start token and EOS, which have no bytes.
    """
    decode = _choose_decoding(content)
    token_bytes = [decode(name) if name else None for name in names]
    for token in content["added_tokens"]:
        own = token["content"].replace(SPACE_MARK, " ").encode()
        token_bytes[token["id"]] = b"" if token["special"] else own
    unknown = content["model"].get("unk_token")
    spell_nothing = roles | ({names.index(unknown)} if unknown and unknown in names else set())
    for token_id in spell_nothing:
        if token_id is not None:
            token_bytes[token_id] = b""
    return tuple(token_bytes)


def _choose_decoding(content: dict[str, Any]) -> Callable[[str], bytes]:
    """Choose the function that turns an entry of the vocabulary into bytes.

    The choice need not be certain: alignment compares the bytes of a row's tokens with its text.
    """
    kinds = _kinds_of(content["decoder"]) or _kinds_before_model(content)
    mark = find_continuation_mark(content)
    if "ByteLevel" in kinds:
        return _decode_byte_level
    if mark is not None:
        return partial(_decode_wordpiece, mark=mark)
    if content["model"].get("byte_fallback") or "ByteFallback" in kinds:
        return _decode_sentencepiece
    if "Metaspace" in kinds:
        return _decode_metaspace
    return str.encode


def find_continuation_mark(content: dict[str, Any]) -> str | None:
    """Find the prefix of tokens that continue a word (`##`); None for models besides WordPiece."""
    model = content["model"]
    return model["continuing_subword_prefix"] if model["type"] == "WordPiece" else None


def _kinds_before_model(content: dict[str, Any]) -> list[str]:
    """List what prepares a text for the model: without a decoder, it shows the notation."""
    kinds = _kinds_of(content["pre_tokenizer"]) + _kinds_of(content["normalizer"])
    writes_mark = any(name.startswith(SPACE_MARK) for name in _list_entries(content["model"]))
    return [*kinds, "Metaspace"] if writes_mark else kinds


def _list_entries(model: dict[str, Any]) -> list[str]:
    vocab = model["vocab"]
    return list(vocab) if isinstance(vocab, dict) else [name for name, _ in vocab]


def _kinds_of(part: dict[str, Any] | None) -> list[str]:
    """List the types of a part of tokenizer.json and of those inside it."""
    if part is None:
        return []
    groups = (part.get(key, []) for key in ("decoders", "pretokenizers", "normalizers"))
    return [part["type"], *(kind for group in groups for one in group for kind in _kinds_of(one))]


def _byte_level_alphabet() -> dict[str, int]:
    """Map each character of GPT-2's byte-level alphabet to its byte.

    GPT-2 writes printable bytes as the Latin-1 characters of the same number, and the other 68,
    space among them, as the characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(shifted)}


_ALPHABET = _byte_level_alphabet()


def _decode_byte_level(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[char] for char in token])
    except KeyError:
        return token.encode()  # an added token is written as plain text


def _decode_sentencepiece(token: str) -> bytes:
    byte = BYTE_PATTERN.fullmatch(token) if token.startswith("<") else None
    return bytes([int(byte[1], 16)]) if byte else _decode_metaspace(token)


def _decode_metaspace(token: str) -> bytes:
    return token.replace(SPACE_MARK, " ").encode()


def _decode_wordpiece(token: str, mark: str) -> bytes:
    """Decode a WordPiece token; one that begins a word gets a space before it."""
    return token.removeprefix(mark).encode() if token.startswith(mark) else f" {token}".encode()
