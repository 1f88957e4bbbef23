"""The attention code of training on packed rows.

transformers' default on PyTorch (`sdpa`) gets a mask of seq_len x seq_len for a sequence of several
rows, and a mask excludes PyTorch's own FlashAttention kernel. The package flash-attn reads where
rows begin instead, which costs nothing and skips what would be masked.
"""

import logging
import re
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from rayfuse.models.causal_lm import CausalLM, keeps_rows_apart
from rayfuse.models.out_of_memory import is_out_of_memory

FLASH = "flash_attention_2"

MIN_FLASH_VERSION = (2, 3, 3)
"""With an older one transformers would look for the kernel on the hub."""

logger = logging.getLogger(__name__)


def prepare_packing(lm: CausalLM, *, pack: bool) -> tuple[CausalLM, bool]:
    """Choose the attention code for packed rows, and check that it keeps them apart.

    Args:
        lm: The target.
        pack: `train.pack`; without it nothing is chosen.

    Returns:
        The target to train, and whether its rows may be packed.
    """
    if not pack:
        return lm, False
    if uses_flash_attention(lm) and (flash := _try_flash_attention(lm)) is not None:
        return flash, True
    return lm, keeps_rows_apart(lm)


def uses_flash_attention(lm: CausalLM) -> bool:
    """Check that a model is on a GPU, in half precision, where flash-attn is installed."""
    weight = lm.head.weight
    is_half = weight.dtype in (torch.bfloat16, torch.float16)
    return weight.is_cuda and is_half and has_flash_attention()


def has_flash_attention() -> bool:
    """Check that flash-attn is installed, in a version that transformers uses."""
    try:
        found = version("flash-attn")
    except PackageNotFoundError:
        return False
    parts = tuple(int(part) for part in re.findall(r"\d+", found)[:3])
    return find_spec("flash_attn") is not None and parts >= MIN_FLASH_VERSION


def _try_flash_attention(lm: CausalLM) -> CausalLM | None:
    """Switch a model to FlashAttention if that keeps rows apart; else leave it as it was."""
    model: Any = lm.model
    default = model.config._attn_implementation
    flash = replace(lm, joins_sequences=True)
    reason = "rows attend to each other"
    try:
        model.set_attn_implementation(FLASH)
        if keeps_rows_apart(flash):
            return flash
    except (ImportError, ValueError, RuntimeError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error}"
    logger.warning("flash-attn is installed, but not used for packed rows: %s", reason)
    model.set_attn_implementation(default)
    return None
