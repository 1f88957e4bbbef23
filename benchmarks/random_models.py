"""LLMs with random weights, created on the device that runs them: nothing is read or downloaded."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rayfuse.models.architecture import build_config
from rayfuse.models.causal_lm import CausalLM, split_head


def build_random_lm(
    config: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    *,
    attention: str | None = None,
) -> CausalLM:
    """Build an LLM from the content of a config.json, in evaluation mode.

    Args:
        config: The content, with its `model_type`.
        device: Where the weights are created.
        dtype: Of the weights.
        attention: The library's name of the attention code; None for its default.
    """
    torch.manual_seed(0)
    built = build_config(config)
    chosen = {} if attention is None else {"attn_implementation": attention}
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(built, dtype=dtype, **chosen)
    return split_head(model.eval(), name=str(config["model_type"]))
