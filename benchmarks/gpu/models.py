"""The models that are measured, as their config.json describes them; weights are random."""

from typing import Any

import torch

from benchmarks.random_models import build_random_lm
from rayfuse.models.causal_lm import CausalLM

CONFIGS: dict[str, dict[str, Any]] = {
    "llama-1.1b": {  # TinyLlama's
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "llama-7b": {  # Llama 2's
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_theta": 100_000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
    },
    "gemma-3-270m": {
        "model_type": "gemma3_text",
        "vocab_size": 262_144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
    },
}

TINY: dict[str, Any] = {
    "vocab_size": 2000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""What a dry run changes: all else of a family stays."""


def read_config(model: str, *, is_tiny: bool) -> dict[str, Any]:
    """Read the config of a model, or of a tiny one of its family."""
    config = CONFIGS[model]
    if not is_tiny:
        return config
    changed = config | TINY
    if "layer_types" in config:
        changed |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    return changed


def build_model(model: str, device: torch.device, *, attention: str | None = None) -> CausalLM:
    """Build a model with random weights: bfloat16 on a GPU, tiny and float32 on a CPU."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    config = read_config(model, is_tiny=not on_gpu)
    return build_random_lm(config, device, dtype, attention=attention)


def read_attention(lm: CausalLM) -> str:
    """Read the library's name of the attention code that a model uses."""
    model: Any = lm.model
    return str(model.config._attn_implementation)
