"""A model's tokenizer: it never produces control tokens from text, and knows each token's bytes.

Alignment compares tokenizers by the bytes of their tokens (`rayfuse.models.token_bytes`).
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer

from rayfuse.config.base import UserError, first_line, user_error_from
from rayfuse.models.token_bytes import (
    BYTE_PATTERN,
    SPACE_MARK,
    find_continuation_mark,
    list_token_bytes,
)

MARKER_PATTERN = re.compile(r"<\S+>")
"""Added tokens of this shape are control tokens, whatever their flag `special` in the file."""

PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of transformers that use tokenizer.json unchanged."""


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer that reads the name of a control token in a text as plain characters."""

    backend: Tokenizer = field(repr=False)
    token_names: tuple[str, ...] = field(repr=False)
    """By id, the token as the vocabulary writes it; empty for missing ids."""
    token_bytes: tuple[bytes | None, ...] = field(repr=False)
    """By id, the token's text in UTF-8; empty for special tokens, None for missing ids."""
    start_id: int | None
    """The token at the start of a row: BOS, or EOS if the model has no BOS; None without both."""
    eos_id: int | None
    """The token at the end of a document; None if the model has none."""
    adds_prefix_space: bool
    """Whether encoding inserts a space before the text (SentencePiece's dummy prefix)."""
    implies_prefix_space: bool
    """Whether a word's first token includes a space that the text may lack (WordPiece)."""
    content_hash: str
    """Identifies the tokenizer in fingerprints."""

    @property
    def vocab_size(self) -> int:
        """The number of ids, those that do not exist included."""
        return len(self.token_bytes)

    def encode(self, texts: list[str]) -> list[Int[np.ndarray, " _"]]:
        """Encode each text into token ids, without start token or EOS."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_with_ends(
        self, texts: list[str]
    ) -> list[tuple[Int[np.ndarray, " _"], Int[np.ndarray, "_ 2"]]]:
        """Encode each text into token ids and the start and end of each token, in characters."""
        encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        return [
            (
                np.array(encoding.ids, dtype=np.int32),
                np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2),
            )
            for encoding in encodings
        ]

    def encode_rows(
        self, texts: list[str], ends_document: list[bool]
    ) -> list[Int[np.ndarray, " _"]]:
        """Encode rows: start token, text, and EOS after the last row of a document.

        Args:
            texts: The text of each row.
            ends_document: For each row, whether it is the last one of its document.
        """
        start = [] if self.start_id is None else [self.start_id]
        eos = [] if self.eos_id is None else [self.eos_id]
        return [
            np.concatenate([start, ids, eos if ends else []]).astype(np.int32)
            for ids, ends in zip(self.encode(texts), ends_document, strict=True)
        ]

    def count_specials(self) -> int:
        """Count the special tokens that `encode_rows` adds to a row at most."""
        return (self.start_id is not None) + (self.eos_id is not None)

    def count_bytes(self) -> Int[np.ndarray, " vocab"]:
        """Count the bytes of each token; 0 for special tokens and ids that do not exist."""
        return np.array([len(text or b"") for text in self.token_bytes], dtype=np.int64)

    def list_by_bytes(self) -> dict[bytes, int]:
        """Map token bytes to ids. Of several ids, the lowest is taken, byte tokens last."""
        by_bytes: dict[bytes, int] = {}
        is_byte = self.byte_ids()
        for token_id, text in enumerate(self.token_bytes):
            if text and not is_byte[token_id]:
                by_bytes.setdefault(text, token_id)
        for token_id, text in enumerate(self.token_bytes):
            if text:
                by_bytes.setdefault(text, token_id)
        return by_bytes

    def byte_ids(self) -> Bool[np.ndarray, " vocab"]:
        """Mask the byte tokens, such as `<0x0A>`, that byte fallback uses."""
        return np.array(
            [
                len(text or b"") == 1 and bool(BYTE_PATTERN.fullmatch(name))
                for text, name in zip(self.token_bytes, self.token_names, strict=True)
            ]
        )

    def known_ids(self) -> Bool[np.ndarray, " vocab"]:
        """Mask the ids that exist."""
        return np.array([text is not None for text in self.token_bytes])


@lru_cache(maxsize=16)
def load_tokenizer(
    model: str, revision: str | None = None, trust_remote_code: bool = False
) -> TextTokenizer:
    """Load the tokenizer of a model folder or hub id.

    Args:
        model: A folder with the tokenizer's files, or a hub id.
        revision: A commit, branch or tag of the hub; None for its default branch.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        UserError: The tokenizer is missing or corrupt, or has no tokenizer.json.
    """
    check_folder(model)
    plain = _read_plain_folder(Path(model).expanduser())
    if plain is not None:
        return plain
    from transformers import AutoTokenizer  # takes 5 seconds; plain folders do not need it

    with user_error_from(
        lambda error: UserError(
            f"model is {model!r}, whose tokenizer cannot be loaded ({first_line(error)}); "
            "give a folder with tokenizer.json or a hub id that this machine may read"
        )
    ):
        loaded: Any = AutoTokenizer.from_pretrained(
            model, revision=revision, trust_remote_code=trust_remote_code, use_fast=True
        )
    if not loaded.is_fast:
        raise UserError(f"model is {model!r}, which has no fast tokenizer (tokenizer.json)")
    return build_tokenizer(
        loaded.backend_tokenizer.to_str(),
        start_id=_first_of(loaded.bos_token_id, loaded.eos_token_id),
        eos_id=loaded.eos_token_id,
    )


def check_folder(model: str) -> None:
    """Check that a model that looks like a path is a folder, as a hub id is NAME or OWNER/NAME.

    Raises:
        UserError: The folder does not exist.
    """
    folder = Path(model).expanduser()
    is_path = folder.is_absolute() or model.startswith(("./", "../", "~")) or model.count("/") > 1
    if is_path and "://" not in model and not folder.is_dir():
        raise UserError(f"model is {model!r}, a folder that does not exist; check the path")


def _read_plain_folder(folder: Path) -> TextTokenizer | None:
    """Read a folder's tokenizer without transformers; None if its class may change tokenizer.json.

    The import of transformers takes 5 seconds on a slow core.

    Raises:
        UserError: A file is corrupt.
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
    """Parse a file's bytes, and name the file in every error.

    Args:
        path: A file of a tokenizer.
        read: Parses the bytes; may raise any exception.

    Raises:
        UserError: `read` raised an exception.
    """
    with user_error_from(
        lambda error: UserError(
            f"{path} is corrupt or not a tokenizer file ({first_line(error)}); "
            "save it again with save_pretrained, or download it again"
        )
    ):
        return read(path.read_bytes())


def _check_object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found a {type(value).__name__}")
    return value


def _find_role(plain: Tokenizer, token: str | dict[str, Any] | None) -> int | None:
    """Look up a token that tokenizer_config.json gives as a string or as an object."""
    if token is None:
        return None
    return plain.token_to_id(token if isinstance(token, str) else token["content"])


def build_tokenizer(
    tokenizer_json: str, *, start_id: int | None, eos_id: int | None
) -> TextTokenizer:
    """Build a tokenizer that never encodes text as a control token.

    Args:
        tokenizer_json: The content of a `tokenizer.json`.
        start_id: The token at the start of a row, if any.
        eos_id: The token at the end of a document, if any.
    """
    content = json.loads(tokenizer_json)
    # `encode_rows` adds start token and EOS. A post-processor would also trim the offsets.
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
        token_bytes=list_token_bytes(content, names, roles={start_id, eos_id}),
        start_id=start_id,
        eos_id=eos_id,
        adds_prefix_space=_adds_prefix_space(backend),
        implies_prefix_space=find_continuation_mark(content) is not None,
        content_hash=hashlib.sha256(canonical.encode()).hexdigest(),
    )


def _hide_control_tokens(content: dict[str, Any]) -> dict[str, Any]:
    """Rename the control tokens of a tokenizer.json so that no text is encoded as one.

    `encode_special_tokens` is not enough: the model itself may still produce `<s>` from the text
    "<s>", as Unigram takes the likeliest pieces, BPE follows its merges, and WordLevel looks up the
    word. The new names contain a space. The pre-tokenizer has removed or replaced all spaces of the
    text when the model sees it, so that these names never match.
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
    """List the tokens as the vocabulary writes them, by id; empty for ids that do not exist."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    names = [""] * (max(vocabulary.values()) + 1)
    for name, token_id in vocabulary.items():
        names[token_id] = name
    return tuple(names)


def _adds_prefix_space(backend: Tokenizer) -> bool:
    """Check by an example whether encoding inserts a space before the text."""
    tokens = backend.encode("a", add_special_tokens=False).tokens
    return bool(tokens) and tokens[0][0] in (SPACE_MARK, "\u0120")


def _first_of(*ids: int | None) -> int | None:
    return next((token_id for token_id in ids if token_id is not None), None)
