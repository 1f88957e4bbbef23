"""Quantised sources: by a `dtype` of the recipe, or as config.json describes the stored weights.

A missing library is found here, before a GPU is requested. `rayfuse.models.architecture` quantises
a model as it loads it.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from rayfuse.config.base import UserError
from rayfuse.config.models import QUANTISED_DTYPES, ModelSettings, SourceSettings

DTYPE_LIBRARIES = {"float8": "torchao", "int8": "bitsandbytes", "int4": "bitsandbytes"}
"""The package that quantises weights as they are loaded, by `dtype`."""

METHOD_LIBRARIES = {
    "aqlm": "aqlm",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "eetq": "kernels",
    "fbgemm_fp8": "fbgemm_gpu",
    "gptq": "gptqmodel",
    "hqq": "hqq",
    "quanto": "optimum",
    "torchao": "torchao",
    "vptq": "vptq",
}
"""The package that reads stored weights, by `quant_method` of config.json; others need none, or
transformers names theirs when the model is loaded."""


def find_method(config: Mapping[str, Any]) -> str | None:
    """Find how the stored weights are quantised by a config.json; None if they are not."""
    given = config.get("quantization_config")
    if not isinstance(given, dict):
        return None
    return str(given.get("quant_method", "bitsandbytes"))  # older files of it do not name it


def check_quantization(settings: ModelSettings, config: Mapping[str, Any]) -> None:
    """Check that a model's quantisation, if it has one, can be used here.

    Args:
        settings: The model.
        config: The content of its config.json.

    Raises:
        UserError: A target is quantised, it is quantised two times, its weights would get an
            adapter, or its library is missing.
    """
    method, dtype = find_method(config), settings.dtype
    is_requested = dtype in QUANTISED_DTYPES
    if method is None and not is_requested:
        return
    name = settings.model
    if not isinstance(settings, SourceSettings):
        raise UserError(
            f"model is {name!r}, whose weights are quantised ({method or dtype}); a target is "
            "trained: use the model that it was made from"
        )
    if method is not None and is_requested:
        raise UserError(
            f"model is {name!r}, whose weights are quantised already ({method}), but dtype is "
            f"{dtype}; remove dtype, or use the model that it was made from"
        )
    if settings.adapter is not None:
        raise UserError(
            f"model is {name!r}, whose weights are quantised ({method or dtype}), so that adapter "
            f"{settings.adapter!r} cannot be merged into them; use dtype auto and the model that "
            "the adapter was trained on"
        )
    library = DTYPE_LIBRARIES[dtype] if is_requested else METHOD_LIBRARIES.get(method or "")
    if settings.backend == "transformers" and library is not None and find_spec(library) is None:
        reason = f"dtype is {dtype}" if is_requested else f"its weights are quantised by {method}"
        raise UserError(
            f"model is {name!r}, and {reason}, which needs {library}; pip install "
            f"{library.replace('_', '-')} on all nodes, or use an unquantised dtype or model"
        )
