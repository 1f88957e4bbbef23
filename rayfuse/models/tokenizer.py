"""Load a model's tokenizer: tokenizer.json verbatim, and the roles of its tokens.

`transformers` builds many tokenizers again from a class of its own, which may drop parts of
tokenizer.json, such as the pre-tokenizer. The file is what the model was trained with, so it alone
decides how text is encoded; the class decides only which tokens start and end a text. Loading the
class takes seconds, so it is skipped where the folder's files name all roles that it knows.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from rayfuse.config.base import UserError, first_line, user_error_from
from rayfuse.models.config_file import check_code_places
from rayfuse.models.folder import TOKENIZER_FILES, find_folder
from rayfuse.models.text_tokenizer import ADDED_FLAGS, TextTokenizer, wrap_tokenizer
from rayfuse.models.tokenizer_json import ParsedTokenizer, parse_tokenizer

PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of transformers that use tokenizer.json unchanged."""

SPECIAL_TOKENS_FILE = "special_tokens_map.json"

ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
"""Keys of tokenizer_config.json and special_tokens_map.json that name a control token."""

ROLE_LISTS = ("additional_special_tokens", "extra_special_tokens")
"""Keys there that name several."""

DEFAULT_ROLES = {
    "CohereTokenizer": ROLES,
    "GPT2Tokenizer": ("bos_token", "eos_token", "unk_token"),
    "GPTNeoXTokenizer": ("bos_token", "eos_token", "unk_token", "pad_token"),
    "GemmaTokenizer": ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token"),
    "LlamaTokenizer": ("bos_token", "eos_token", "unk_token"),
    "Qwen2Tokenizer": ("eos_token", "unk_token", "pad_token"),
}
"""The roles to which classes of transformers give a token of their own if no file does."""

PROBE = "On 30 Nov 2026,  naïve\tusers typed 1,234.50 + x_1\n\n  漢字!"
"""A text on which tokenizers differ: digits, runs of spaces, a tab, empty lines, accents."""


@dataclass(frozen=True)
class SpecialTokens:
    """The control tokens of a tokenizer by their roles."""

    bos: str | None
    eos: str | None
    names: frozenset[str]
    """All of them."""


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
        UserError: The tokenizer is missing or corrupt, has no tokenizer.json, or marks the ends of
            words instead of their beginnings; or it takes code from another repository.
    """
    folder = find_folder(model, revision, TOKENIZER_FILES)
    path = folder / "tokenizer.json"
    config = _read_object(folder / "tokenizer_config.json")
    if trust_remote_code:
        check_code_places(config, folder / "tokenizer_config.json")
    own = _read_own(folder, config) if path.is_file() else None
    if own is not None and _names_all_roles(folder, config):
        return _build(path, own, _read_special_tokens(folder, config))
    loaded = _load_class(model, revision, trust_remote_code, folder)
    if own is None:
        own = parse_tokenizer(loaded.backend_tokenizer.to_str())
    names = frozenset(map(str, loaded.all_special_tokens))
    return _build(path, own, SpecialTokens(loaded.bos_token, loaded.eos_token, names))


def describe_class_difference(
    model: str, revision: str | None = None, trust_remote_code: bool = False
) -> str | None:
    """Describe how a tokenizer's class in transformers differs from its tokenizer.json.

    Loads the class, which takes seconds.

    Args:
        model: As for `load_tokenizer`.
        revision: As for `load_tokenizer`.
        trust_remote_code: As for `load_tokenizer`.

    Returns:
        None if the two give the same tokens of a probe text, or the class is the file alone.

    Raises:
        UserError: As for `load_tokenizer`.
    """
    folder = find_folder(model, revision, TOKENIZER_FILES)
    own = load_tokenizer(model, revision, trust_remote_code)
    config = _read_object(folder / "tokenizer_config.json")
    has_own = (folder / "tokenizer.json").is_file()
    if not has_own or config.get("tokenizer_class") in PLAIN_CLASSES:
        return None
    return _compare(own.backend, _load_class(model, revision, trust_remote_code, folder))


def _names_all_roles(folder: Path, config: dict[str, Any]) -> bool:
    """Check that the folder's files name the roles just as the tokenizer's class would.

    That is certain for plain classes and those of `DEFAULT_ROLES` where tokenizer_config.json
    gives each of the roles to which the class gives a token of its own, or null, and no other key
    or file adds control tokens.
    """
    name = str(config.get("tokenizer_class"))
    defaults = () if name in PLAIN_CLASSES else DEFAULT_ROLES.get(name.removesuffix("Fast"))
    others = {key for key in config if key.endswith("_token") and key not in ROLES}
    return (
        defaults is not None
        and config.keys() >= set(defaults)
        and not any(isinstance(config[key], str | dict) for key in others)
        and not all(config.get(key) for key in ROLE_LISTS)
        and config.keys().isdisjoint(["auto_map", "model_specific_special_tokens"])
        and ("added_tokens_decoder" in config or not (folder / SPECIAL_TOKENS_FILE).is_file())
    )


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one for a file that does not exist."""
    if not path.is_file():
        return {}
    return _read_checked(path, lambda data: _check_object(json.loads(data)))


def _read_checked(path: Path, read: Callable[[bytes], Any]) -> Any:
    """Parse a file's bytes, and name the file in every error.

    Args:
        path: A file of a tokenizer.
        read: Parses the bytes; may raise any exception.

    Raises:
        UserError: `read` raised an exception.
    """
    with _naming_file(path):
        return read(path.read_bytes())


def _naming_file(path: Path) -> AbstractContextManager[None]:
    """Turn any error into a `UserError` that names the file."""
    return user_error_from(
        lambda error: UserError(
            f"{path} is corrupt or not a tokenizer file ({first_line(error)}); "
            "save it again with save_pretrained, or download it again"
        )
    )


def _check_object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found a {type(value).__name__}")
    return value


def _read_own(folder: Path, config: dict[str, Any]) -> ParsedTokenizer:
    """Read tokenizer.json, and add the tokens that other files append to its vocabulary.

    Raises:
        UserError: A file is corrupt.
    """
    path = folder / "tokenizer.json"
    own = _read_checked(path, lambda data: parse_tokenizer(data.decode()))
    added = (
        _read_checked(folder / "tokenizer_config.json", lambda _: _list_added(config))
        if config
        else []
    )
    legacy = folder / "added_tokens.json"
    if "added_tokens_decoder" not in config and legacy.is_file():
        added = _read_checked(legacy, lambda data: _list_legacy(_check_object(json.loads(data))))
    appended: dict[str, dict[str, Any]] = {}
    find_id, num_ids = own.backend.token_to_id, own.backend.get_vocab_size()
    for token in sorted(added, key=lambda token: token["id"]):
        name, next_id = token["content"], num_ids + len(appended)
        # Others are in the vocabulary already, or have an id that tokenizers would not give them.
        if name not in appended and find_id(name) is None and token["id"] == next_id:
            appended[name] = token
    if not appended:
        return own
    added_tokens = own.content["added_tokens"] + list(appended.values())
    return parse_tokenizer(json.dumps(own.content | {"added_tokens": added_tokens}))


def _list_added(config: dict[str, Any]) -> list[dict[str, Any]]:
    """List the added tokens of a tokenizer_config.json as tokenizer.json writes them."""
    added: dict[str, dict[str, Any]] = config.get("added_tokens_decoder") or {}
    return [
        {"id": int(token_id), "content": token["content"], "special": bool(token.get("special"))}
        | {flag: bool(token.get(flag, default)) for flag, default in ADDED_FLAGS.items()}
        for token_id, token in added.items()
    ]


def _list_legacy(ids: dict[str, Any]) -> list[dict[str, Any]]:
    """List the added tokens of an added_tokens.json as tokenizer.json writes them."""
    return [
        {"id": int(token_id), "content": name, "special": False} | ADDED_FLAGS
        for name, token_id in ids.items()
    ]


def _read_special_tokens(folder: Path, config: dict[str, Any]) -> SpecialTokens:
    """Read the roles as transformers does: special_tokens_map.json counts in older folders.

    Raises:
        UserError: A file is corrupt.
    """
    path = folder / SPECIAL_TOKENS_FILE
    given = config
    if "added_tokens_decoder" not in config:
        given = config | _read_object(path)
    source = folder / "tokenizer_config.json"
    return _read_checked(
        source if source.is_file() else path, lambda _: _parse_special_tokens(given)
    )


def _parse_special_tokens(given: dict[str, Any]) -> SpecialTokens:
    lists = [given.get(key) or [] for key in ROLE_LISTS]
    several = [token for tokens in lists for token in _list_values(tokens)]
    one = [given[role] for role in ROLES if given.get(role) is not None]
    return SpecialTokens(
        bos=_name_of(given.get("bos_token")),
        eos=_name_of(given.get("eos_token")),
        names=frozenset(str(_name_of(token)) for token in [*one, *several]),
    )


def _list_values(tokens: list[Any] | dict[str, Any]) -> list[Any]:
    return list(tokens.values()) if isinstance(tokens, dict) else tokens


def _name_of(token: str | dict[str, Any] | None) -> str | None:
    """Read a token that is given as a string or as an object.

    Raises:
        TypeError, KeyError: It is neither.
    """
    if token is None or isinstance(token, str):
        return token
    return token["content"]


def _load_class(model: str, revision: str | None, trust_remote_code: bool, folder: Path) -> Any:
    """Load a tokenizer by its class in transformers.

    Raises:
        UserError: It cannot be loaded, or it is not of the `tokenizers` library.
    """
    from transformers import AutoTokenizer  # takes 5 seconds; plain folders do not need it

    place = str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model
    is_sentencepiece = not (folder / "tokenizer.json").is_file() and any(folder.glob("*.model"))
    remedy = (
        "it has a SentencePiece model but no tokenizer.json: convert it where sentencepiece is "
        "installed (AutoTokenizer.from_pretrained, then save_pretrained)"
        if is_sentencepiece
        else "give a folder with tokenizer.json or a hub id that this machine may read"
    )
    with user_error_from(
        lambda error: UserError(
            f"model is {model!r}, whose tokenizer cannot be loaded ({first_line(error)}); {remedy}"
        )
    ):
        loaded: Any = AutoTokenizer.from_pretrained(
            place, revision=revision, trust_remote_code=trust_remote_code, use_fast=True
        )
    if not loaded.is_fast:
        raise UserError(f"model is {model!r}, which has no fast tokenizer (tokenizer.json)")
    return loaded


def _compare(own: Tokenizer, loaded: Any) -> str | None:
    """Compare tokenizer.json with the class in transformers; describe a difference."""
    ours = own.encode(PROBE, add_special_tokens=False)
    theirs = loaded.backend_tokenizer.encode(PROBE, add_special_tokens=False)
    if ours.ids == theirs.ids:
        return None
    at = next(
        (i for i, (a, b) in enumerate(zip(ours.ids, theirs.ids, strict=False)) if a != b),
        min(len(ours.ids), len(theirs.ids)),
    )
    return (
        f"the class {type(loaded).__name__} of transformers gives other tokens than tokenizer.json "
        f"({theirs.tokens[at : at + 3]} instead of {ours.tokens[at : at + 3]}); tokenizer.json is "
        "used"
    )


def _build(path: Path, own: ParsedTokenizer, special: SpecialTokens) -> TextTokenizer:
    """Build the tokenizer of a folder.

    Raises:
        UserError: tokenizer.json has an unexpected structure, or marks the ends of words.
    """
    suffix = own.content["model"].get("end_of_word_suffix")
    if suffix:
        raise UserError(
            f"{path}: model.end_of_word_suffix is {suffix!r}; tokens that mark the ends of words "
            "do not spell the spaces of a text, so they cannot be aligned: use another model"
        )
    bos, eos = (
        None if name is None else own.backend.token_to_id(name)
        for name in (special.bos, special.eos)
    )
    with _naming_file(path):
        return wrap_tokenizer(
            own,
            start_id=eos if bos is None else bos,
            eos_id=eos,
            control_names=special.names,
        )
