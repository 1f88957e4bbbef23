"""What can be told of a model from its files alone, before any weights are loaded."""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rayfuse.config.base import UserError, first_line
from rayfuse.config.models import ModelSettings
from rayfuse.models.tokenizer import TextTokenizer, check_folder, load_tokenizer

WHOLE_HASH_BYTES = 64 * 2**20
"""Weights up to this size are hashed whole; of larger files, 64 spread blocks of 1 MiB."""

PLAIN_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
"""A model's files besides its weights."""

BOOKKEEPING = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""Keys of a config that say where a model comes from and how it is stored."""

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class ModelFiles:
    """What tells a model from another, and what it can take."""

    identity: str
    """Hash of the weights and the config of a folder; the commit of a hub model."""
    head_width: int
    """Rows of the head: logits per position."""
    context_tokens: int | None
    """The longest row it takes, where its config says."""
    num_bytes: int
    """Of its weights; 1 where nobody has counted them."""
    config: dict[str, Any]
    """Its config.json."""


def load_recipe_tokenizer(settings: ModelSettings) -> TextTokenizer:
    """Return the tokenizer of a recipe's model.

    Raises:
        UserError: As for `load_tokenizer`.
    """
    return load_tokenizer(settings.model, settings.revision, settings.trust_remote_code)


def check_model(settings: ModelSettings, max_tokens: int, *, role: str) -> ModelFiles:
    """Return what a model's files say, once it is clear that it can be used.

    Raises:
        UserError: The model is missing, has no safetensors, has fewer logits than its tokenizer
            has ids, or takes no rows of `max_tokens`.
    """
    try:
        files = read_model_files(settings.model, settings.revision)
        vocab_size = load_recipe_tokenizer(settings).vocab_size
    except ValueError as error:
        raise UserError(f"{role}: {error}") from error
    if files.head_width < vocab_size:
        raise UserError(
            f"{role}: model is {settings.model!r}, whose tokenizer has {vocab_size} ids but whose "
            f"head gives only {files.head_width} logits; the tokenizer is another model's"
        )
    if files.context_tokens is not None and files.context_tokens < max_tokens:
        raise UserError(
            f"corpus.max_tokens is {max_tokens}, more than the {files.context_tokens} tokens that "
            f"{role} {settings.model!r} takes; use <= {files.context_tokens}"
        )
    return files


@lru_cache(maxsize=16)
def read_model_files(model: str, revision: str | None) -> ModelFiles:
    """Return what the files of a folder or hub id say of a model.

    Raises:
        UserError: There is no such folder or id, or it holds no config or no safetensors.
    """
    folder = Path(model).expanduser()
    check_folder(model)
    if folder.is_dir():
        config, identity = _read_folder(folder)
        num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    else:
        config, identity = _read_hub(model, revision)
        num_bytes = 1
    contexts = [config[key] for key in CONTEXT_KEYS if isinstance(config.get(key), int)]
    context_tokens = min(contexts, default=None)
    return ModelFiles(identity, config["vocab_size"], context_tokens, num_bytes, config)


def find_difference(ours: ModelFiles, theirs: ModelFiles) -> str | None:
    """Return why two models' weights mean different things, by their configs; None if they do not.

    Their tokenizers are for the caller to compare.
    """
    keys = ours.config.keys() | theirs.config.keys()
    for key in ["model_type", *sorted(filter(_is_of_weights, keys))]:
        own, other = ours.config.get(key), theirs.config.get(key)
        if own != other:
            return f"its {key} is {other!r}, not {own!r}"
    return None


def _is_of_weights(key: str) -> bool:
    """Return whether a key of a config says what weights there are, or what they mean."""
    is_of_use = key in BOOKKEEPING or key.endswith("_token_id") or key == "use_cache"
    return not is_of_use and "dropout" not in key and not key.endswith("pdrop")


def _read_folder(folder: Path) -> tuple[dict[str, Any], str]:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").is_file():
        raise UserError(
            f"model is {str(folder)!r}, a folder without config.json and *.safetensors; "
            "save the model there with save_pretrained"
        )
    hashes = [f"{file.name}:{hash_file(file)}" for file in [folder / "config.json", *weights]]
    config = json.loads((folder / "config.json").read_bytes())
    return config, hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _read_hub(model: str, revision: str | None) -> tuple[dict[str, Any], str]:
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(model, "config.json", revision=revision))
    except Exception as error:  # the hub's errors share no class
        reason = first_line(error)
        raise UserError(
            f"model is {model!r}, which is no folder here and cannot be had from the hub "
            f"({reason}); check the name, or log in if it is gated"
        ) from error
    # The cache keeps a file under snapshots/COMMIT/: the commit is what the id stood for.
    return json.loads(path.read_bytes()), f"{model}@{path.parent.name}"


def find_folder(settings: ModelSettings) -> Path:
    """Return the folder that a model's files lie in; those of the hub are fetched first."""
    folder = Path(settings.model).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", *PLAIN_FILES]
    return Path(
        snapshot_download(settings.model, revision=settings.revision, allow_patterns=patterns)
    )


def hash_file(path: Path) -> str:
    """Return a hash of a file, of large ones of 64 spread blocks."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= WHOLE_HASH_BYTES:
            digest.update(file.read())
        else:
            for block in range(64):
                file.seek(block * (size - 2**20) // 63)
                digest.update(file.read(2**20))
    return digest.hexdigest()
