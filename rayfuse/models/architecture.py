"""A model's architecture in transformers, and whether its files hold exactly its tensors.

Imported late: torch and transformers take seconds, and only a model that is built needs them.
"""

import importlib
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    TorchAoConfig,
)
from transformers.utils import logging as hf_logging
from transformers.utils.peft_utils import find_adapter_config_file

from rayfuse.config.base import UserError, user_error_from
from rayfuse.config.models import QUANTISED_DTYPES, ModelSettings, TrainedSettings
from rayfuse.models.adapter import check_peft, read_adapter
from rayfuse.models.config_file import read_config
from rayfuse.models.out_of_memory import is_out_of_memory
from rayfuse.models.parts import find_parts
from rayfuse.models.placement import Placement
from rayfuse.models.weight_files import (
    ADAPTER,
    StoredTensor,
    check_no_adapter,
    list_weight_files,
    read_headers,
)

UNUSED_SUBMODULES = frozenset(
    {
        "audio_tower",
        "embed_audio",
        "embed_vision",
        "mm_projector",
        "mtp",
        "multi_modal_projector",
        "vision_model",
        "vision_tower",
        "visual",
    }
)
"""Submodules that a causal LLM may leave unread: they serve images, audio or draft tokens."""

OUR_CHOICES = ("_attn_implementation", "_experts_implementation")
"""Attributes of a config that choose code, also from the hub; None for the library's default."""

FOREIGN_KEYS = ("transformers_weights", "fusion_config")
"""Keys of config.json that would choose other weight files or other code."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

SHOWN_TENSORS = 3


def load_model(settings: ModelSettings, dtype: torch.dtype, placement: Placement) -> Any:
    """Load a model from safetensors, if its files hold exactly its tensors.

    An adapter is merged into it.

    Args:
        settings: The model.
        dtype: The dtype of its weights.
        placement: Its devices.

    Raises:
        UserError: It cannot be loaded, does not fit its devices, a tensor is missing, has another
            shape, or has no use, or its adapter does not fit it.
    """
    config, name = load_config(settings), _expand(settings.model)
    if find_adapter_config_file(name, revision=settings.revision) is not None:
        check_no_adapter([ADAPTER], settings.model)
    with _naming(settings.model):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            revision=settings.revision,
            code_revision=_find_code(settings).revision,
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,
            dtype=dtype,
            quantization_config=_build_quantization(settings.dtype),
            device_map=placement.device_map,
            max_memory=placement.max_memory,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    model, found = loaded
    _check_complete(found, settings.model)
    placement.check_fits(model, settings.model)
    adapter = read_adapter(settings)
    if adapter is None:
        return model
    return _import_lora().merge_adapter(model, adapter, settings.adapter)


def _build_quantization(dtype: str) -> Any:
    """Build what transformers quantises weights by as it loads them; None for other dtypes.

    float8: weights alone, e4m3. int8: LLM.int8 (arXiv 2208.07339). int4: NF4 (arXiv 2305.14314).
    """
    if dtype not in QUANTISED_DTYPES:
        return None
    if dtype == "float8":
        torchao: Any = importlib.import_module("torchao.quantization")
        return TorchAoConfig(quant_type=torchao.Float8WeightOnlyConfig())
    if dtype == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


def _import_lora() -> Any:
    """Import what needs peft.

    Raises:
        UserError: peft is not installed.
    """
    check_peft()
    from rayfuse.models import lora

    return lora


def load_config(settings: ModelSettings) -> Any:
    """Load a model's config, without its choices of kernels, attention code and weight files.

    Raises:
        UserError: The config cannot be loaded, takes code from another repository, or is that of a
            family without a causal LLM.
    """
    origin = _find_code(settings)
    read_config(origin)  # before any code that it names runs
    with _naming(settings.model):
        config: Any = AutoConfig.from_pretrained(
            _expand(origin.model),
            revision=origin.revision,
            trust_remote_code=origin.trust_remote_code,
        )
    if origin is not settings and hasattr(config, "auto_map"):
        places = {
            name: f"{_expand(origin.model)}--{place}" for name, place in config.auto_map.items()
        }
        config.auto_map = places
    if not origin.trust_remote_code:
        _check_causal(config, settings.model)
    return _reset_choices(config)


def _check_causal(config: Any, model: str) -> None:
    """Check that transformers has a causal LLM for a config.

    Raises:
        UserError: It has none.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"model is {model!r}, of model_type {config.model_type!r}, for which transformers has "
            "no causal LLM (AutoModelForCausalLM); use a decoder-only LLM"
        )


def _find_code(settings: ModelSettings) -> ModelSettings:
    """Find the model that a model's config and own code come from: never code in the storage."""
    if isinstance(settings, TrainedSettings) and settings.trust_remote_code:
        return settings.target
    return settings


def build_config(config: Mapping[str, Any]) -> Any:
    """Build a config from the content of a config.json, without its choices of kernels.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: The family is unknown, or a value is wrong.
    """
    values = dict(config)
    return _reset_choices(AutoConfig.for_model(values.pop("model_type", ""), **values))


def _reset_choices(config: Any) -> Any:
    """Leave the choice of kernels, attention code and weight files to transformers."""
    for name in OUR_CHOICES:
        setattr(config, name, None)
    for key in FOREIGN_KEYS:
        if hasattr(config, key):
            setattr(config, key, None)
    return config


def find_default_width(config: Mapping[str, Any]) -> int | None:
    """Find the vocabulary size that a family has where config.json gives none.

    Raises:
        UserError: transformers does not know the family.
    """
    with _naming(str(config.get("model_type"))):
        built = build_config(config)
    return getattr(built.get_text_config(), "vocab_size", None)


def build_on_meta(config: Any) -> Any:
    """Build a model without memory for its weights.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: A value is missing or wrong.
    """
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def count_parameters(settings: ModelSettings) -> int:
    """Count the weights of a model from its config alone.

    Raises:
        UserError: It cannot be built.
    """
    with _naming(settings.model):
        built = build_on_meta(load_config(settings))
    return sum(parameter.numel() for parameter in built.parameters())


def compare_tensors(settings: ModelSettings) -> None:
    """Compare the headers of a folder's weight files with its architecture, which must have a head.

    transformers itself loads tensors without memory, so that its renames and fusions of tensors
    count. Quantised models and those with their own code are built only where they are loaded.

    Raises:
        UserError: A tensor is missing, has another shape, or has no use, a file is corrupt, or the
            adapter does not fit the model, or the model has no linear head on top of a body.
    """
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()  # its table of missing tensors; the error lists them
    folder = Path(settings.model).expanduser()
    stored = read_headers(list_weight_files(folder))
    config = load_config(settings)
    if settings.trust_remote_code or getattr(config, "quantization_config", None) is not None:
        return
    with _naming(settings.model):
        built = build_on_meta(config)
        find_parts(built, name=settings.model)
        model, found = type(built).from_pretrained(
            None,
            config=built.config,
            state_dict={name: _describe(tensor) for name, tensor in stored.items()},
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    _check_complete(found, settings.model)
    adapter = read_adapter(settings)
    if adapter is not None:
        _import_lora().add_empty_adapter(model, adapter, settings.adapter)


def check_architecture(settings: ModelSettings) -> None:
    """Check that a model of the hub is a causal LLM with a linear head, by its config.json alone.

    Raises:
        UserError: It is none.
    """
    with _naming(settings.model):
        config = build_config(read_config(settings))
        _check_causal(config, settings.model)
        if getattr(config, "quantization_config", None) is None:
            find_parts(build_on_meta(config), name=settings.model)


def _describe(tensor: StoredTensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=DTYPES.get(tensor.dtype, torch.int64), device="meta")


def _check_complete(found: Mapping[str, Any], model: str) -> None:
    """Check what transformers reports of a load; tied tensors are not among the missing ones.

    Raises:
        UserError: A tensor is missing, has another shape, or has no use, or has failed.
    """
    mismatched = [
        f"{name} is {list(stored)}, not {list(needed)}"
        for name, stored, needed in found["mismatched_keys"]
    ]
    unused = [name for name in found["unexpected_keys"] if not _is_unused_submodule(name)]
    failed = [*found.get("conversion_errors", {}), *found.get("error_msgs", [])]
    faults = {
        "missing": found["missing_keys"],
        "of another shape": mismatched,
        "unknown to the architecture": unused,
        "not readable": failed,
    }
    texts = [f"{_list_names(names)} {fault}" for fault, names in faults.items() if names]
    if texts:
        raise UserError(
            f"model is {model!r}, whose weights are not those that its config.json describes: "
            f"{'; '.join(texts)}. Download it again, or use the config.json that it was saved with"
        )


def _list_names(names: Iterable[str]) -> str:
    ordered = sorted(map(str, names))
    more = len(ordered) - SHOWN_TENSORS
    shown = ", ".join(ordered[:SHOWN_TENSORS]) + (f" and {more} more" if more > 0 else "")
    return f"{shown} {'is' if len(ordered) == 1 else 'are'}"


def _is_unused_submodule(tensor: str) -> bool:
    return not UNUSED_SUBMODULES.isdisjoint(tensor.split("."))


def _expand(model: str) -> str:
    folder = Path(model).expanduser()
    return str(folder) if folder.is_dir() else model


@contextmanager
def _naming(model: str) -> Generator[None]:
    """Name the model in every error of a library; a lack of memory may pass, and is kept."""

    def explain(error: BaseException) -> UserError:
        if is_out_of_memory(error) or isinstance(error, UserError):
            raise error
        return UserError(f"model is {model!r}, which cannot be loaded: {str(error).strip()}")

    with user_error_from(explain):
        yield
