"""One model's tokenizer as rayfuse uses it: text is only ever text, every token spells bytes."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer

from rayfuse.config.base import UserError, first_line

SPACE_MARK = "\u2581"
"""SentencePiece's sign for a blank."""

MARKER_PATTERN = re.compile(r"<\S+>")
"""Added tokens of this shape are control tokens, whatever flag their file gives them."""

BYTE_PATTERN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes that use tokenizer.json unchanged."""


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer that reads control tokens in a text as plain characters."""

    backend: Tokenizer = field(repr=False)
    token_names: tuple[str, ...] = field(repr=False)
    """Each id's entry as the vocabulary writes it; empty for ids that do not exist."""
    token_bytes: tuple[bytes | None, ...] = field(repr=False)
    """What each id spells in UTF-8; empty for special tokens, None for ids that do not exist."""
    start_id: int | None
    """The token before a text: BOS, or EOS where the model has no BOS."""
    eos_id: int | None
    adds_prefix_space: bool
    """A blank that the text does not have is put before it (SentencePiece's dummy prefix)."""
    implies_prefix_space: bool
    """A token that begins a word spells a blank even where the text has none (WordPiece)."""
    content_hash: str

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to this, holes included."""
        return len(self.token_bytes)

    def encode(self, texts: list[str]) -> list[Int[np.ndarray, " _"]]:
        """Return the ids of each text, without start token or EOS."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_with_ends(
        self, texts: list[str]
    ) -> list[tuple[Int[np.ndarray, " _"], Int[np.ndarray, "_ 2"]]]:
        """Return the ids of each text and where each token begins and ends, in characters."""
        encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        return [
            (
                np.array(each.ids, dtype=np.int32),
                np.array(each.offsets, dtype=np.int64).reshape(-1, 2),
            )
            for each in encodings
        ]

    def encode_rows(
        self, texts: list[str], ends_document: list[bool]
    ) -> list[Int[np.ndarray, " _"]]:
        """Return the ids of each row: start token, text, and EOS where the document ends."""
        start = [] if self.start_id is None else [self.start_id]
        eos = [] if self.eos_id is None else [self.eos_id]
        return [
            np.concatenate([start, ids, eos if ends else []]).astype(np.int32)
            for ids, ends in zip(self.encode(texts), ends_document, strict=True)
        ]

    def count_specials(self) -> int:
        """Return how many tokens of a row can be start token and EOS."""
        return (self.start_id is not None) + (self.eos_id is not None)

    def count_bytes(self) -> Int[np.ndarray, " vocab"]:
        """Return how many bytes each id spells; 0 for special tokens and holes."""
        return np.array([len(spelled or b"") for spelled in self.token_bytes], dtype=np.int64)

    def list_by_bytes(self) -> dict[bytes, int]:
        """Return the token for each string of bytes: of several, one that is no byte token."""
        by_bytes: dict[bytes, int] = {}
        is_byte = self.byte_ids()
        for token_id, spelled in enumerate(self.token_bytes):
            if spelled and not is_byte[token_id]:
                by_bytes.setdefault(spelled, token_id)
        for token_id, spelled in enumerate(self.token_bytes):
            if spelled:
                by_bytes.setdefault(spelled, token_id)
        return by_bytes

    def byte_ids(self) -> Bool[np.ndarray, " vocab"]:
        """Return a mask over ids: byte tokens, for what has no token of its own (byte fallback)."""
        return np.array(
            [
                len(spelled or b"") == 1 and bool(BYTE_PATTERN.fullmatch(name))
                for spelled, name in zip(self.token_bytes, self.token_names, strict=True)
            ]
        )

    def known_ids(self) -> np.ndarray:
        """Return a mask over ids: the tokenizer has the id."""
        return np.array([spelled is not None for spelled in self.token_bytes])


@lru_cache(maxsize=16)
def load_tokenizer(
    model: str, revision: str | None = None, trust_remote_code: bool = False
) -> TextTokenizer:
    """Return the tokenizer of a model folder or hub id.

    Raises:
        UserError: It cannot be loaded.
    """
    check_folder(model)
    plain = _read_plain_folder(Path(model).expanduser())
    if plain is not None:
        return plain
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(
            model, revision=revision, trust_remote_code=trust_remote_code, use_fast=True
        )
    except Exception as error:  # every loader of the library raises its own kind
        raise UserError(
            f"model is {model!r}, whose tokenizer cannot be loaded ({first_line(error)}); "
            "give a folder with tokenizer.json or a hub id that this machine may read"
        ) from error
    if not loaded.is_fast:
        raise UserError(f"model is {model!r}, which has no fast tokenizer (tokenizer.json)")
    return build_tokenizer(
        loaded.backend_tokenizer.to_str(),
        start_id=_first_of(loaded.bos_token_id, loaded.eos_token_id),
        eos_id=loaded.eos_token_id,
    )


def check_folder(model: str) -> None:
    """Check that a model which can only be a folder is there: a hub id is NAME or OWNER/NAME.

    Raises:
        UserError: There is no such folder.
    """
    folder = Path(model).expanduser()
    is_path = folder.is_absolute() or model.startswith(("./", "../", "~")) or model.count("/") > 1
    if is_path and "://" not in model and not folder.is_dir():
        raise UserError(f"model is {model!r}, a folder that does not exist; check the path")


def _read_plain_folder(folder: Path) -> TextTokenizer | None:
    """Return a folder's tokenizer where the library would take tokenizer.json as it is.

    It spares the import of transformers, 5 seconds on a slow core.

    Raises:
        UserError: A file is damaged.
    """
    config_path, path = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not config_path.is_file() or not path.is_file():
        return None
    config = _read_checked(config_path, lambda data: _check_object(json.loads(data)))
    plain = _read_checked(path, lambda data: Tokenizer.from_str(data.decode()))
    if config.get("tokenizer_class") not in PLAIN_CLASSES:
        return None
    bos, eos = _read_checked(
        config_path,
        lambda _: [_find_role(plain, config.get(role)) for role in ("bos_token", "eos_token")],
    )
    start = _first_of(bos, eos)
    return _read_checked(
        path, lambda _: build_tokenizer(plain.to_str(), start_id=start, eos_id=eos)
    )


def _read_checked(path: Path, read: Callable[[bytes], Any]) -> Any:
    """Return what is read from a file's bytes.

    Raises:
        UserError: They are damaged in any way.
    """
    try:
        return read(path.read_bytes())
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(
            f"{path} is damaged or no tokenizer's ({first_line(error)}); "
            "save it again with save_pretrained, or download it again"
        ) from error


def _check_object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} where an object should be")
    return value


def _find_role(plain: Tokenizer, token: str | dict[str, Any] | None) -> int | None:
    """Return the id of a token that a config names, plainly or as an object."""
    if token is None:
        return None
    return plain.token_to_id(token if isinstance(token, str) else token["content"])


def build_tokenizer(
    tokenizer_json: str, *, start_id: int | None, eos_id: int | None
) -> TextTokenizer:
    """Return a tokenizer from the text of a `tokenizer.json`."""
    content = json.loads(tokenizer_json)
    # Start token and EOS are put by `encode_rows`; a post-processor would also trim offsets.
    content["truncation"] = content["padding"] = content["post_processor"] = None
    for added in content["added_tokens"]:
        added["special"] = added["special"] or bool(MARKER_PATTERN.fullmatch(added["content"]))
    names = _list_names(Tokenizer.from_str(json.dumps(content)))
    backend = Tokenizer.from_str(json.dumps(_hide_control_tokens(content)))
    backend.encode_special_tokens = True
    roles = json.dumps([start_id, eos_id])
    canonical = json.dumps(content, sort_keys=True) + roles
    return TextTokenizer(
        backend=backend,
        token_names=names,
        token_bytes=_spell_vocabulary(content, names, roles={start_id, eos_id}),
        start_id=start_id,
        eos_id=eos_id,
        adds_prefix_space=_adds_prefix_space(backend),
        implies_prefix_space=_continuation_mark(content) is not None,
        content_hash=hashlib.sha256(canonical.encode()).hexdigest(),
    )


def _hide_control_tokens(content: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer in which no text is spelled by a control token.

    Unigram takes whichever entries are likeliest, BPE whatever its merges make, WordLevel each word
    that it has: control tokens among them. Under a name with a blank in it, which no text has by
    then, they are never met.
    """
    hidden = {
        token["content"]: f"control token {token['content']}"
        for token in content["added_tokens"]
        if token["special"]
    }
    model = dict(content["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(name, name): i for name, i in model["vocab"].items()}
    else:
        model["vocab"] = [[hidden.get(name, name), score] for name, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in hidden]
    if "unk_token" in model:
        model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    added_tokens = [
        token | {"content": hidden.get(token["content"], token["content"])}
        for token in content["added_tokens"]
    ]
    return content | {"model": model, "added_tokens": added_tokens}


def _list_names(backend: Tokenizer) -> tuple[str, ...]:
    vocabulary = backend.get_vocab(with_added_tokens=True)
    names = [""] * (max(vocabulary.values()) + 1)
    for name, token_id in vocabulary.items():
        names[token_id] = name
    return tuple(names)


def _spell_vocabulary(
    content: dict[str, Any], names: tuple[str, ...], roles: set[int | None]
) -> tuple[bytes | None, ...]:
    spell = _choose_spelling(content)
    added = {token["id"]: token for token in content["added_tokens"]}
    unknown = content["model"].get("unk_token")
    spelled: list[bytes | None] = []
    for token_id, name in enumerate(names):
        if not name:
            spelled.append(None)
        elif name == unknown or token_id in roles:
            spelled.append(b"")
        elif token_id in added:
            special = added[token_id]["special"]
            spelled.append(b"" if special else name.replace(SPACE_MARK, " ").encode())
        else:
            spelled.append(spell(name))
    return tuple(spelled)


def _choose_spelling(content: dict[str, Any]) -> Callable[[str], bytes]:
    """Return how a vocabulary's entries are read; what they say is checked against each text."""
    kinds = _kinds_of(content["decoder"])
    mark = _continuation_mark(content)
    if "ByteLevel" in kinds:
        return _spell_byte_level
    if mark is not None:
        return partial(_spell_wordpiece, mark=mark)
    if content["model"].get("byte_fallback") or "ByteFallback" in kinds:
        return _spell_sentencepiece
    if "Metaspace" in kinds:
        return _spell_metaspace
    return str.encode


def _continuation_mark(content: dict[str, Any]) -> str | None:
    """Return what WordPiece writes before a token that goes on with a word."""
    model = content["model"]
    return model["continuing_subword_prefix"] if model["type"] == "WordPiece" else None


def _kinds_of(part: dict[str, Any] | None) -> list[str]:
    """List the types of a decoder and of those inside it."""
    if part is None:
        return []
    inner = [kind for decoder in part.get("decoders", []) for kind in _kinds_of(decoder)]
    return [part["type"], *inner]


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte each character of GPT-2's printable alphabet stands for."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(shifted)}


_ALPHABET = _byte_level_alphabet()


def _spell_byte_level(token: str) -> bytes:
    if all(char in _ALPHABET for char in token):
        return bytes(_ALPHABET[char] for char in token)
    return token.encode()  # an entry outside the alphabet is plain text


def _spell_sentencepiece(token: str) -> bytes:
    byte = BYTE_PATTERN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else _spell_metaspace(token)


def _spell_metaspace(token: str) -> bytes:
    return token.replace(SPACE_MARK, " ").encode()


def _spell_wordpiece(token: str, mark: str) -> bytes:
    """Return the bytes of a WordPiece token: one that begins a word comes after a blank."""
    return token.removeprefix(mark).encode() if token.startswith(mark) else f" {token}".encode()


def _adds_prefix_space(backend: Tokenizer) -> bool:
    tokens = backend.encode("a", add_special_tokens=False).tokens
    return bool(tokens) and tokens[0][0] in (SPACE_MARK, "\u0120")


def _first_of(*ids: int | None) -> int | None:
    return next((token_id for token_id in ids if token_id is not None), None)
