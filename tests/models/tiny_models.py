"""Tiny models of every family with random weights; Ray's workers import this too."""

import dataclasses
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from tests.models.families import FAMILIES, VISION, Family


def tiny_config(
    family: str,
    vocab_size: int,
    *,
    tied: bool | None = None,
    context: int = 512,
    width: int = 32,
    **changes: Any,
) -> Any:
    """Build the config of a family: two layers of two heads.

    Args:
        family: A name in `FAMILIES`, or a `model_type` of transformers.
        vocab_size: Rows of the embedding and of the head.
        tied: Whether they are the same weights; by default, as usual in the family.
        context: The context length.
        width: Of the hidden states.
        changes: More values.
    """
    entry = FAMILIES.get(family, Family("other"))
    model_type = entry.model_type or family
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "max_position_embeddings": context,
        "max_seq_len": context,
        "vocab_size": vocab_size,
        "pad_token_id": None,
    } | ({} if tied is None else {"tie_word_embeddings": tied})
    if entry.is_multimodal:
        text = CONFIG_MAPPING[model_type].sub_configs["text_config"].model_type
        values = _select(text, sizes) | entry.changes
        return AutoConfig.for_model(model_type, text_config=values, vision_config=VISION, **changes)
    return AutoConfig.for_model(
        model_type, **(_select(model_type, sizes) | entry.changes | changes)
    )


def _select(model_type: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Select the sizes that a config has, under this name or another of its own."""
    kind = CONFIG_MAPPING[model_type]
    known = {entry.name for entry in dataclasses.fields(kind)} | kind.attribute_map.keys()
    return {key: value for key, value in sizes.items() if key in known}


@torch.no_grad()
def build_model(config: Any) -> Any:
    """Build a model with random weights so large that every layer changes its predictions."""
    torch.manual_seed(0)
    is_multimodal = "text_config" in config.sub_configs
    build = AutoModelForImageTextToText if is_multimodal else AutoModelForCausalLM
    model = build.from_config(config)
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and not name.endswith("A_log"):
            weight.normal_(0, weight.shape[-1] ** -0.5)
        elif name.endswith("bias"):
            weight.normal_(0, 0.1)
    return model.eval()
