"""The files of a LoRA adapter that a recipe names beside a model: found, read and checked.

The adapter is merged into the weights as the model is loaded (`rayfuse.models.lora`), so that all
other code sees one model.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rayfuse.config.base import UserError
from rayfuse.config.models import ModelSettings
from rayfuse.models.file_hash import hash_file
from rayfuse.models.folder import find_folder, read_json_object
from rayfuse.models.weight_files import ADAPTER, list_pickles

ADAPTER_WEIGHTS = "adapter_model.safetensors"

MERGED_KEYS = frozenset(
    {
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "fan_in_fan_out",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "modules_to_save",
        "r",
        "rank_pattern",
        "target_modules",
        "use_dora",
        "use_rslora",
    }
)
"""Keys of adapter_config.json that decide what is added to the weights."""

UNUSED_KEYS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "init_lora_weights",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "task_type",
    }
)
"""Keys that decide nothing about a trained adapter, or are checked on their own."""

PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base's weights as they are. With others, such as
`pissa`, the adapter belongs to weights that peft computes from the base."""


@dataclass(frozen=True)
class AdapterFiles:
    """The two files of an adapter."""

    folder: Path
    settings: Mapping[str, Any]
    """The part of adapter_config.json that decides what is added to the weights."""
    base: str | None
    """The model that the adapter was trained on, as its config names it."""

    @property
    def weights(self) -> Path:
        """The file of its weights."""
        return self.folder / ADAPTER_WEIGHTS


def read_adapter(settings: ModelSettings) -> AdapterFiles | None:
    """Find and check the adapter of a model; None without one. A hub adapter is downloaded.

    Raises:
        UserError: The adapter is missing, is no LoRA adapter, has no safetensors, or cannot be
            merged.
    """
    if settings.adapter is None:
        return None
    patterns = (ADAPTER, ADAPTER_WEIGHTS)
    name = settings.adapter
    folder = find_folder(name, settings.adapter_revision, patterns, setting="adapter")
    if not (folder / ADAPTER).is_file():
        raise UserError(
            f"adapter is {name!r}, without {ADAPTER}; name a LoRA adapter that peft has saved"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickles = list_pickles(folder)
        fault = f"whose weights are not safetensors ({pickles[0]})" if pickles else "without it"
        raise UserError(
            f"adapter is {name!r}, {fault}: rayfuse reads {ADAPTER_WEIGHTS} alone; save the "
            "adapter again with a newer peft (save_pretrained), or use another revision"
        )
    config = read_json_object(folder / ADAPTER)
    _check_config(config, name)
    merged = {key: config[key] for key in sorted(MERGED_KEYS & config.keys())}
    base = config.get("base_model_name_or_path")
    return AdapterFiles(folder, merged, None if base is None else str(base))


def check_peft() -> None:
    """Check that peft, which merges adapters, is installed on this node.

    Raises:
        UserError: It is not.
    """
    if find_spec("peft") is None:
        raise UserError("`adapter` needs peft; pip install 'rayfuse[lora]' on all nodes")


def _check_config(config: Mapping[str, Any], name: str) -> None:
    """Check that an adapter adds to the weights alone, in a way that peft can merge.

    Raises:
        UserError: It does not.
    """
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"adapter is {name!r}, whose peft_type is {config.get('peft_type')!r}; rayfuse merges "
            "LORA adapters alone: merge it with peft, save the model, and name that as `model`"
        )
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise UserError(
            f"adapter is {name!r}, whose init_lora_weights {config['init_lora_weights']!r} changes "
            "the weights of its base; save it with path_initial_model_for_weight_conversion (peft)"
        )
    known = MERGED_KEYS | UNUSED_KEYS
    others = sorted(key for key, value in config.items() if value and key not in known)
    if others:
        raise UserError(
            f"adapter is {name!r}, whose {others[0]} is {config[others[0]]!r}, which rayfuse does "
            "not merge; merge it with peft, save the model, and name that as `model`"
        )


def identify_adapter(settings: ModelSettings) -> str | None:
    """Hash the bytes of a model's adapter, or name the commit of a hub adapter; None without one.

    Raises:
        UserError: As for `read_adapter`.
    """
    files = read_adapter(settings)
    if files is None or settings.adapter is None:
        return None
    if not Path(settings.adapter).expanduser().is_dir():
        return f"{settings.adapter}@{files.folder.name}"  # the hub's cache: snapshots/COMMIT
    hashes = [hash_file(files.folder / ADAPTER), hash_file(files.weights)]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()
