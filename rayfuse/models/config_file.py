"""A model's config.json: found, read, and checked before anything is built from it."""

from pathlib import Path
from typing import Any

import huggingface_hub  # loads its submodules on first use

from rayfuse.config.base import UserError
from rayfuse.config.models import ModelSettings
from rayfuse.models.folder import check_folder, naming_hub_model, read_json_object
from rayfuse.models.refused import check_family
from rayfuse.models.weight_files import list_weight_files

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""Keys of config.json that limit the context length, in different families."""

TEXT_KEYS = ("text_config", "decoder", "generator", "text_encoder")
"""Keys of config.json that hold the part for text, as in `get_text_config` of transformers."""

LONG_ROPE = ("longrope", "su")
"""Names of LongRoPE in config.json; the second is the older one."""

MAX_COUNT = 4096
"""The most layers or experts: a model is built on the meta device before it is loaded."""


def read_context_tokens(settings: ModelSettings) -> int | None:
    """Read a model's context length from its config.json; None if that does not limit it.

    Raises:
        UserError: There is no config.json, or it cannot be used.
    """
    return find_context(read_config(settings))


def find_config(model: str, revision: str | None) -> Path:
    """Find a model's config.json; for a hub model only this file is downloaded.

    Raises:
        UserError: There is none.
    """
    check_folder(model)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return _fetch_config(model, revision)
    if not (folder / "config.json").is_file():
        list_weight_files(folder)  # raises a more specific error for most other folders
        raise UserError(
            f"model is {str(folder)!r}, a folder without config.json and *.safetensors; "
            "save the model there with save_pretrained"
        )
    return folder / "config.json"


def _fetch_config(model: str, revision: str | None) -> Path:
    with naming_hub_model(model):
        return Path(huggingface_hub.hf_hub_download(model, "config.json", revision=revision))


def read_config(settings: ModelSettings) -> dict[str, Any]:
    """Read a model's config.json, and check what it would make transformers do.

    Raises:
        UserError: It is missing or corrupt, names more than `MAX_COUNT` layers or experts, is that
            of a family that rayfuse refuses, or, for a model that may run its own code, takes code
            from another repository.
    """
    path = find_config(settings.model, settings.revision)
    config = read_json_object(path)
    for part in (config, find_text_part(config)):
        for key, value in part.items():
            if isinstance(value, int) and value > MAX_COUNT and _is_count(key):
                raise UserError(f"{path}: {key} is {value}, more than {MAX_COUNT}; correct it")
    check_family(config, path)
    if settings.trust_remote_code:
        check_code_places(config, path)
    return config


def check_code_places(config: dict[str, Any], path: Path) -> None:
    """Check that a model's own code is in its own repository or folder, which its identity covers.

    Args:
        config: The content of a JSON file with an `auto_map`.
        path: The file, for errors.

    Raises:
        UserError: `auto_map` names another repository.
    """
    places = config.get("auto_map") or {}
    values = places.values() if isinstance(places, dict) else [places]
    for value in values:
        for place in value if isinstance(value, list) else [value]:
            if "--" in str(place):  # transformers writes REPOSITORY--module.Class
                raise UserError(
                    f"{path}: auto_map takes code from another repository ({place}), whose version "
                    "the model does not fix; copy that code into a folder with the model, and "
                    "remove 'REPOSITORY--' from auto_map"
                )


def _is_count(key: str) -> bool:
    return key in ("n_layer", "n_layers") or key.endswith(("_layers", "_experts"))


def find_text_part(config: dict[str, Any]) -> dict[str, Any]:
    """Find the part of a config for text; a multimodal model has it nested."""
    parts = (config.get(key) for key in TEXT_KEYS)
    return next((part for part in parts if isinstance(part, dict)), config)


def find_long_rope(config: dict[str, Any]) -> int | None:
    """Find the row length beyond which LongRoPE changes its factors; None without LongRoPE."""
    text = config | find_text_part(config)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) not in LONG_ROPE:
        return None
    key = "original_max_position_embeddings"
    return text.get(key) or rope.get(key)


def find_context(config: dict[str, Any]) -> int | None:
    """Find the context length in a config.json; None if it has none."""
    text = config | find_text_part(config)
    contexts = [text[key] for key in CONTEXT_KEYS if isinstance(text.get(key), int)]
    return min(contexts, default=None)
