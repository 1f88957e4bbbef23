"""A model's tokenizer: it never produces control tokens from text, and knows each token's bytes.

Alignment compares tokenizers by the bytes of their tokens (`rayfuse.models.token_bytes`).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
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
from rayfuse.models.tokenizer_json import ParsedTokenizer, parse_tokenizer

CONTROL_NAMES = frozenset({"<s>", "</s>", "<unk>", "<pad>"})
"""SentencePiece's control tokens: also without the flag `special` of an added token."""

MAX_UNUSED_IDS = 2**16
"""The most ids that a vocabulary may skip: each takes memory in every process."""

ADDED_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
"""The flags of an added token that tokenizer.json does not list; its text is matched exactly."""


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
    is_of_answers: bool = False
    """Whether texts are answers in conversations: the first token of one may also spell a space of
    the template before it, or of the tokenizer."""
    control_names: frozenset[str] = frozenset()
    """The control tokens; a text that holds one is encoded as plain characters."""
    added_names: frozenset[str] = frozenset()
    """The tokens that were added to the vocabulary, control tokens among them."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy; `tokenizers` pickles a backend without this flag."""
        vars(self).update(state)
        self.backend.encode_special_tokens = True

    @property
    def vocab_size(self) -> int:
        """The number of ids, those that do not exist included."""
        return len(self.token_bytes)

    def encode(self, texts: list[str]) -> list[Int[np.ndarray, " _"]]:
        """Encode each text into token ids, without start token or EOS.

        Raises:
            UserError: The tokenizer fails on a text.
        """
        with user_error_from(_explain_failure):
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_with_ends(
        self, texts: list[str]
    ) -> list[tuple[Int[np.ndarray, " _"], Int[np.ndarray, "_ 2"]]]:
        """Encode each text into token ids and the start and end of each token, in characters.

        Raises:
            UserError: The tokenizer fails on a text.
        """
        with user_error_from(_explain_failure):
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

    def count_control_names(self, texts: Iterable[str]) -> int:
        """Count the names of control tokens in texts, which are encoded as plain characters."""
        # One regular expression of all names takes 0.2 seconds to compile for Gemma's 6,249.
        names = self.control_names
        firsts = re.compile("|".join(re.escape(c) for c in {n[0] for n in names}) or "(?!)")
        lengths = sorted({len(name) for name in names}, reverse=True)
        count = 0
        for text in texts:
            end = 0
            for at in (match.start() for match in firsts.finditer(text)):
                if at >= end:
                    end = next((at + n for n in lengths if text[at : at + n] in names), at)
                    count += end > at
        return count

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


def _explain_failure(error: BaseException) -> UserError:
    return UserError(
        f"the tokenizer fails on a text ({first_line(error)}); its pre-tokenizer in tokenizer.json "
        "may hold a regular expression without a limit: use another model"
    )


def build_tokenizer(
    tokenizer_json: str,
    *,
    start_id: int | None,
    eos_id: int | None,
    control_names: Iterable[str] = (),
) -> TextTokenizer:
    """Build a tokenizer that never encodes text as a control token.

    Args:
        tokenizer_json: The content of a `tokenizer.json`.
        start_id: The token at the start of a row, if any.
        eos_id: The token at the end of a document, if any.
        control_names: Tokens that are control tokens, also without the flag `special`.

    Raises:
        ValueError: The vocabulary skips too many ids.
    """
    parsed = parse_tokenizer(tokenizer_json)
    return wrap_tokenizer(parsed, start_id=start_id, eos_id=eos_id, control_names=control_names)


def wrap_tokenizer(
    parsed: ParsedTokenizer,
    *,
    start_id: int | None,
    eos_id: int | None,
    control_names: Iterable[str] = (),
) -> TextTokenizer:
    """Build the same as `build_tokenizer` from a parsed tokenizer.json.

    Args:
        parsed: Its backend becomes the result's, as building a large one again takes a second: it
            must not be used elsewhere.
        start_id: As for `build_tokenizer`.
        eos_id: As for `build_tokenizer`.
        control_names: As for `build_tokenizer`.

    Raises:
        ValueError: The vocabulary skips too many ids.
    """
    content = _mark_control_tokens(parsed.content, frozenset(control_names))
    # `encode_rows` adds start token and EOS. A post-processor would also trim the offsets.
    content["truncation"] = content["padding"] = content["post_processor"] = None
    if content["model"].get("dropout"):  # random merges: the same text would give other tokens
        content["model"] |= {"dropout": None}
    names = _list_names(content)
    roles = json.dumps([start_id, eos_id])
    canonical = json.dumps(content, sort_keys=True) + roles
    added = content["added_tokens"]
    backend = _hide_control_tokens(parsed, content)
    return TextTokenizer(
        backend=backend,
        token_names=names,
        token_bytes=list_token_bytes(content, names, roles={start_id, eos_id}),
        start_id=start_id,
        eos_id=eos_id,
        adds_prefix_space=_adds_prefix_space(backend),
        implies_prefix_space=find_continuation_mark(content) is not None,
        content_hash=hashlib.sha256(canonical.encode()).hexdigest(),
        control_names=_list_special(added),
        added_names=frozenset(token["content"] for token in added),
    )


def _mark_control_tokens(content: dict[str, Any], roles: Set[str]) -> dict[str, Any]:
    """Mark the tokens with a role as special; entries of the vocabulary become added tokens."""
    hidden = CONTROL_NAMES | roles
    added = [
        token | {"special": token["special"] or token["content"] in hidden}
        for token in content["added_tokens"]
    ]
    ids = _list_ids(content["model"])
    added += [
        {"id": ids[name], "content": name, "special": True} | ADDED_FLAGS
        for name in roles - {token["content"] for token in added}
        if name in ids
    ]
    return content | {"added_tokens": sorted(added, key=lambda token: token["id"])}


def hide_name(name: str) -> str:
    """Choose the name under which a control token is hidden from text."""
    return f"control token {name}"


def _list_ids(model: dict[str, Any]) -> dict[str, int]:
    vocab = model["vocab"]
    return vocab if isinstance(vocab, dict) else {name: i for i, (name, _) in enumerate(vocab)}


def _hide_control_tokens(parsed: ParsedTokenizer, content: dict[str, Any]) -> Tokenizer:
    """Let no text be encoded as a control token.

    Args:
        parsed: Its backend is changed, and returned unless it has to be built again.
        content: Its content, with the control tokens marked as special.
    """
    added, backend = content["added_tokens"], parsed.backend
    hidden = _list_special(added)
    others = [token["content"] for token in added if not token["special"]]
    if _may_produce(content["model"], hidden) or _may_cover(hidden, others):
        names = {name: hide_name(name) for name in hidden}
        backend = Tokenizer.from_str(json.dumps(rename_control_tokens(content, names)))
    else:
        backend.add_special_tokens(sorted(hidden - _list_special(parsed.content["added_tokens"])))
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None
    backend.encode_special_tokens = True
    return backend


def _list_special(added: list[dict[str, Any]]) -> frozenset[str]:
    return frozenset(token["content"] for token in added if token["special"])


def _may_produce(model: dict[str, Any], hidden: Set[str]) -> bool:
    """Check whether a model could produce one of these tokens from text.

    BPE produces characters, byte tokens and the results of its merges, no others.
    """
    if model["type"] != "BPE" or model["ignore_merges"] or model["continuing_subword_prefix"]:
        return True
    if any(len(name) == 1 or BYTE_PATTERN.fullmatch(name) for name in hidden):
        return True
    return not hidden.isdisjoint(map("".join, model["merges"]))


def _may_cover(hidden: Set[str], others: list[str]) -> bool:
    """Check whether a control token in a text could cover the beginning of another added token.

    `encode_special_tokens` skips the text of a control token, with all that begins inside it.
    """
    firsts = {name[0] for name in others if name}
    insides = set("".join(name[1:] for name in hidden))
    return bool(firsts & insides) or any(name.startswith(tuple(others)) for name in hidden)


def rename_control_tokens(content: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Rename the control tokens of a tokenizer.json so that no text is encoded as one.

    `encode_special_tokens` is not enough: the model itself may still produce `<s>` from the text
    "<s>", as Unigram takes the likeliest pieces, BPE follows its merges, and WordLevel looks up the
    word. The new names contain a space. The pre-tokenizer has removed or replaced all spaces of the
    text when the model sees it, so that these names never match.

    Args:
        content: The tokenizer.json.
        names: The new names of control tokens, by their names there.
    """
    hidden = names.keys()
    model = dict(content["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(name, name): i for name, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(name, name), score] for name, score in model["vocab"]]
    if "merges" in model:
        # A merge with a control token as a part is never applied, as none gives that part.
        model["merges"] = [
            pair for pair in model["merges"] if hidden.isdisjoint([*pair, "".join(pair)])
        ]
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    added_tokens = [
        token | {"content": names.get(token["content"], token["content"])}
        for token in content["added_tokens"]
    ]
    return content | {"model": model, "added_tokens": added_tokens}


def _list_names(content: dict[str, Any]) -> tuple[str, ...]:
    """List the tokens as the vocabulary writes them, by id; empty for ids that do not exist.

    Raises:
        ValueError: More than `MAX_UNUSED_IDS` ids do not exist.
    """
    ids = _list_ids(content["model"])
    vocabulary = ids | {token["content"]: token["id"] for token in content["added_tokens"]}
    num_ids = max(vocabulary.values()) + 1
    if num_ids - len(vocabulary) > MAX_UNUSED_IDS:
        raise ValueError(f"its {len(vocabulary)} tokens have ids up to {num_ids - 1}")
    names = [""] * num_ids
    for name, token_id in vocabulary.items():
        names[token_id] = name
    return tuple(names)


def _adds_prefix_space(backend: Tokenizer) -> bool:
    """Check by an example whether encoding inserts a space before the text."""
    tokens = backend.encode("a", add_special_tokens=False).tokens
    return bool(tokens) and tokens[0][0] in (SPACE_MARK, "\u0120")
