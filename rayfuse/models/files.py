"""Read a model's files without loading its weights: identity, context length, configuration."""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import huggingface_hub  # imports its parts when they are used

from rayfuse.config.base import UserError, first_line, user_error_from
from rayfuse.config.models import ModelSettings
from rayfuse.models.tokenizer import TextTokenizer, check_folder, load_tokenizer

MAX_FULL_HASH_BYTES = 64 * 2**20
"""Files up to this size are hashed completely; of larger files, 64 blocks of 1 MiB at equal
distances."""

PLAIN_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
"""Patterns of a model's files besides its weights."""

IGNORED_KEYS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""Keys of config.json that describe where a model comes from and how it is stored."""

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""Keys of config.json that limit the context length, in different families."""


@dataclass(frozen=True)
class ModelFiles:
    """The identity and the limits of a model."""

    identity: str
    """Hash of a folder's weights and config.json; id and commit of a hub model."""
    head_width: int
    """Logits per position; may exceed the tokenizer's vocabulary by padding."""
    context_tokens: int | None
    """Context length; None if config.json does not limit it."""
    num_bytes: int
    """Bytes of the weights; 1 for a hub model, whose weights are not downloaded to count them."""
    config: dict[str, Any]
    """The content of config.json."""


def load_recipe_tokenizer(settings: ModelSettings) -> TextTokenizer:
    """Load the tokenizer of a recipe's model.

    Raises:
        UserError: As for `load_tokenizer`.
    """
    return load_tokenizer(settings.model, settings.revision, settings.trust_remote_code)


def check_model(settings: ModelSettings, max_tokens: int, *, role: str) -> ModelFiles:
    """Read a model's files and check that a run can use the model.

    Args:
        settings: The model.
        max_tokens: Maximum length of a row.
        role: `target` or the source's name, for errors.

    Raises:
        UserError: The model is missing, has no safetensors, has fewer logits than its tokenizer
            has ids, or has a context shorter than `max_tokens`.
    """
    try:
        files = read_model_files(settings.model, settings.revision)
        vocab_size = load_recipe_tokenizer(settings).vocab_size
    except ValueError as error:
        raise UserError(f"{role}: {error}") from error
    if files.head_width < vocab_size:
        raise UserError(
            f"{role}: model is {settings.model!r}, whose tokenizer has {vocab_size} ids but whose "
            f"head gives only {files.head_width} logits; use the tokenizer of this model"
        )
    if files.context_tokens is not None and files.context_tokens < max_tokens:
        raise UserError(
            f"corpus.max_tokens is {max_tokens}, more than the context of {files.context_tokens} "
            f"tokens of {role} {settings.model!r}; use <= {files.context_tokens}"
        )
    return files


@lru_cache(maxsize=16)
def read_model_files(model: str, revision: str | None) -> ModelFiles:
    """Read the files of a folder, or the config.json of a hub model.

    Raises:
        UserError: The folder or the hub id does not exist, or a folder has no config.json or no
            safetensors.
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
    """Find a reason in two models' configs why their weights cannot be averaged; None without one.

    Their tokenizers are not compared.
    """
    keys = ours.config.keys() | theirs.config.keys()
    for key in ["model_type", *sorted(filter(_affects_weights, keys))]:
        own, other = ours.config.get(key), theirs.config.get(key)
        if own != other:
            return f"its {key} is {other!r}, not {own!r}"
    return None


def _affects_weights(key: str) -> bool:
    """Check if a key of config.json determines which weights exist or how they are used."""
    is_irrelevant = key in IGNORED_KEYS or key.endswith("_token_id") or key == "use_cache"
    return not is_irrelevant and "dropout" not in key and not key.endswith("pdrop")


def _read_folder(folder: Path) -> tuple[dict[str, Any], str]:
    """Read the config and the identity of a model in a folder."""
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
    """Read the config and the identity of a hub model; downloads config.json alone."""
    with user_error_from(
        lambda error: UserError(
            f"model is {model!r}, which is not a local folder and cannot be read from the hub "
            f"({first_line(error)}); check the name, or log in if it is gated"
        )
    ):
        path = Path(huggingface_hub.hf_hub_download(model, "config.json", revision=revision))
    # The hub's cache stores files under snapshots/COMMIT/. A branch may move; the commit is fixed.
    return json.loads(path.read_bytes()), f"{model}@{path.parent.name}"


def find_folder(settings: ModelSettings) -> Path:
    """Find the folder of a model's files; downloads those of a hub model first."""
    folder = Path(settings.model).expanduser()
    if folder.is_dir():
        return folder
    patterns = ["*.safetensors", *PLAIN_FILES]
    return Path(
        huggingface_hub.snapshot_download(
            settings.model, revision=settings.revision, allow_patterns=patterns
        )
    )


def hash_file(path: Path) -> str:
    """Hash a file: size and content, or 64 blocks of the content if it is large."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= MAX_FULL_HASH_BYTES:
            digest.update(file.read())
        else:
            for block in range(64):
                file.seek(block * (size - 2**20) // 63)
                digest.update(file.read(2**20))
    return digest.hexdigest()
