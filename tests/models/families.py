"""One table of model families, each with the config of a tiny model (`tests.models.tiny_models`).

Rows of the tests are longer than every window here, and all experts are in use.
"""

from dataclasses import dataclass, field
from typing import Any

WINDOW = 8
"""Tokens of sliding windows, chunks and local attention."""

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}
MLA: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
SSM: dict[str, Any] = {
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
CHUNKED: dict[str, Any] = EXPERTS | {
    "num_experts_per_tok": 1,
    "num_local_experts": 4,
    "intermediate_size_mlp": 64,
    "head_dim": 16,
    "attention_chunk_size": WINDOW,
    "layer_types": ["chunked_attention", "full_attention"],
    "no_rope_layers": [1, 0],
    "pad_token_id": None,
}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}


@dataclass(frozen=True)
class Family:
    """A family's tiny config, as far as it differs from that of Llama."""

    kind: str
    """What sets it apart, in a few words."""
    changes: dict[str, Any] = field(default_factory=dict)
    model_type: str | None = None
    """transformers' name for it, if the table has another."""
    is_multimodal: bool = False
    """The text part is nested: `changes` describe it."""
    is_random_in_training: bool = False
    """Routers draw experts at random in training mode, so that no two passes are equal."""


FAMILIES: dict[str, Family] = {
    "llama": Family("rotary positions"),
    "mistral": Family("sliding window", {"sliding_window": WINDOW}),
    "mixtral": Family("experts", EXPERTS | {"num_local_experts": 4}),
    "qwen2": Family("biases in attention"),
    "qwen2_moe": Family(
        "experts, one shared",
        EXPERTS
        | {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "qwen3": Family("norms of queries and keys", {"head_dim": 16}),
    "qwen3_moe": Family(
        "experts", EXPERTS | {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 16}
    ),
    "qwen3_next": Family(
        "gated delta rule, experts",
        EXPERTS
        | DELTA
        | {
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "head_dim": 16,
        },
    ),
    "qwen3_5_text": Family("gated delta rule", DELTA | {"head_dim": 16}),
    "olmo": Family("norms without weights"),
    "olmo2": Family("norms after the layers"),
    "olmo3": Family("sliding window in some layers", ALTERNATING),
    "olmoe": Family("experts", EXPERTS | {"num_experts": 4}),
    "gemma": Family("scaled embeddings", {"head_dim": 16}),
    "gemma2": Family(  # a cap that all logits reach
        "capped logits, sliding window",
        {"head_dim": 16, "final_logit_softcapping": 0.05, "sliding_window": WINDOW},
    ),
    "gemma3_text": Family("sliding window in some layers", {"head_dim": 16} | ALTERNATING),
    "gemma3": Family("multimodal", {"head_dim": 16} | ALTERNATING, is_multimodal=True),
    "gemma4_text": Family(
        "capped logits, sliding window, inputs of each layer",
        {
            "head_dim": 16,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 320,
            "final_logit_softcapping": 0.5,
        }
        | ALTERNATING,
    ),
    "phi": Family("head with a bias"),
    "phi3": Family(
        "fused projections, sliding window",
        {"sliding_window": WINDOW, "pad_token_id": None},
    ),
    "phi3 (LongRoPE)": Family(
        "factors change at 24 tokens",
        {
            "num_key_value_heads": 2,
            "pad_token_id": None,
            "original_max_position_embeddings": 24,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
            },
        },
        "phi3",
    ),
    "phimoe": Family(
        "experts, drawn at random in training; head with a bias",
        {"num_local_experts": 4, "lm_head_bias": True},
        is_random_in_training=True,
    ),
    "gpt2": Family("learned positions", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt_bigcode": Family(
        "one key-value head", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ),
    "gpt_neo": Family(
        "local attention in some layers",
        {"window_size": WINDOW, "attention_types": [[["global", "local"], 1]]},
    ),
    "gpt_neox": Family("parallel layers"),
    "gptj": Family("parallel layers, head with a bias", {"rotary_dim": 8}),
    "codegen": Family("parallel layers", {"rotary_dim": 8, "num_attention_heads": 4}),
    "mpt": Family("ALiBi"),
    "falcon": Family("one key-value head"),
    "falcon (ALiBi)": Family("ALiBi", {"alibi": True}, "falcon"),
    "bloom": Family("ALiBi"),
    "opt": Family(
        "learned positions, projection before the head",
        {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False, "dropout": 0.0},
    ),
    "biogpt": Family(
        "learned positions",
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "layerdrop": 0.0},
    ),
    "xglm": Family(
        "sinusoidal positions",
        {"ffn_dim": 64, "dropout": 0.0, "attention_dropout": 0.0},
    ),
    "ctrl": Family(
        "sinusoidal positions, head with a bias",
        {"dff": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    ),
    "cohere": Family("scaled logits, parallel layers", {"logit_scale": 0.25}),
    "cohere2": Family(
        "scaled logits, sliding window",
        {"logit_scale": 0.25, "head_dim": 16} | ALTERNATING,
    ),
    "granite": Family("divided logits", {"logits_scaling": 4.0, "residual_multiplier": 0.5}),
    "granitemoe": Family(
        "divided logits, experts", EXPERTS | {"num_local_experts": 4, "logits_scaling": 4.0}
    ),
    "granitemoehybrid": Family(
        "state space and attention, experts",
        EXPERTS
        | SSM
        | {
            "num_local_experts": 4,
            "logits_scaling": 4.0,
            "shared_intermediate_size": 16,
            "layer_types": ["mamba", "attention"],
        },
    ),
    "hyperclovax": Family("multiplied logits", {"logits_scaling": 0.25}),
    "stablelm": Family("rotary positions in a part of each head"),
    "starcoder2": Family("sliding window", {"sliding_window": WINDOW}),
    "minicpm3": Family(
        "scaled logits, latent attention",
        {k: v for k, v in MLA.items() if "expert" not in k and k[:3] not in ("moe", "fir")}
        | {"dim_model_base": 16},
    ),
    "nanochat": Family("capped logits", {"final_logit_softcapping": 0.5}),
    "mamba": Family("state space", {"state_size": 8, "time_step_rank": 4}),
    "mamba2": Family(
        "state space",
        {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    ),
    "falcon_mamba": Family("state space", {"state_size": 8, "time_step_rank": 4}),
    "falcon_h1": Family(
        "state space beside attention, scaled logits",
        SSM | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5, "head_dim": 16},
    ),
    "jamba": Family(
        "state space and attention, experts",
        EXPERTS
        | {
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "bamba": Family("state space and attention", SSM | {"attn_layer_indices": [1]}),
    "recurrent_gemma": Family(
        "recurrence and local attention, capped logits",
        {
            "attention_window_size": WINDOW,
            "lru_width": 32,
            "block_types": ["recurrent", "attention"],
            "logits_soft_cap": 0.5,
            "head_dim": 16,
        },
    ),
    "rwkv": Family("recurrence", {"attention_hidden_size": 32}),
    "lfm2": Family("short convolutions and attention", {"layer_types": ["conv", "full_attention"]}),
    "minimax": Family(
        "lightning attention, experts",
        EXPERTS
        | {
            "num_local_experts": 4,
            "head_dim": 16,
            "block_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "deepseek_v2": Family(
        "latent attention, experts", EXPERTS | MLA | {"topk_method": "greedy", "head_dim": 8}
    ),
    "deepseek_v3": Family(
        "latent attention, experts", EXPERTS | MLA | {"n_group": 1, "topk_group": 1}
    ),
    "deepseek_v32": Family(
        "latent attention with selected keys, experts",
        EXPERTS
        | MLA
        | {
            "n_group": 1,
            "topk_group": 1,
            "index_topk": 4,
            "index_n_heads": 16,
            "index_head_dim": 16,
        },
    ),
    "gpt_oss": Family(
        "experts, attention sinks, sliding window",
        EXPERTS | {"num_local_experts": 4, "head_dim": 16} | ALTERNATING,
    ),
    "smollm3": Family("layers without positions", {"no_rope_layers": [1, 0], "pad_token_id": None}),
    "llama4": Family(
        "multimodal, of which the part for text is loaded",
        CHUNKED,
        is_multimodal=True,
    ),
    "llama4_text": Family(
        "attention in chunks, experts",
        CHUNKED,
    ),
    "glm4": Family("norms before and after the layers", {"head_dim": 16, "pad_token_id": None}),
    "ernie4_5_moe": Family(
        "experts",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 16,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "exaone4": Family("norms after the layers, sliding window", ALTERNATING),
    "hunyuan_v1_dense": Family("norms after the rotation", {"head_dim": 16}),
    "nemotron": Family("squared ReLU"),
    "nemotron_h": Family(
        "state space and attention",
        {
            "hybrid_override_pattern": "M*",
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 16,
            "head_dim": 16,
        },
    ),
    "zamba2": Family(
        "state space, one attention layer shared by several",
        {
            "mamba_d_state": 8,
            "n_mamba_heads": 4,
            "mamba_ngroups": 1,
            "chunk_size": 16,
            "layers_block_type": ["mamba", "hybrid"],
            "num_mem_blocks": 1,
            "use_mem_rope": True,
            "adapter_rank": 8,
            "attention_head_dim": 32,
        },
    ),
    "xlstm": Family(
        "recurrence", {"num_blocks": 2, "num_heads": 2, "autocast_kernel_dtype": "float32"}
    ),
    "apertus": Family("norms of queries and keys"),
    "diffllama": Family("differential attention", {"num_key_value_heads": 2}),
    "helium": Family("rotary positions", {"head_dim": 16}),
    "seed_oss": Family(
        "biases in attention", {"head_dim": 16, "attention_dropout": 0.0, "residual_dropout": 0.0}
    ),
    "glm4_moe": Family(
        "experts, one shared",
        EXPERTS
        | {
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "head_dim": 16,
        },
    ),
    "minimax_m2": Family("experts", EXPERTS | {"num_local_experts": 4, "head_dim": 16}),
    "openai-gpt": Family(
        "learned positions", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ),
}

PAD: dict[str, Any] = {"pad_token_id": 1}

REFUSED_FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "big_bird": {"attention_type": "original_full"},
    "camembert": PAD,
    "data2vec-text": PAD,
    "electra": {"embedding_size": 32},
    "ernie": {},
    "inkling_text": {},
    "megatron-bert": {},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "roberta": PAD,
    "roberta-prelayernorm": PAD,
    "roc_bert": {},
    "roformer": {"embedding_size": 32},
    "xlm-roberta": PAD,
    "xlm-roberta-xl": PAD,
    "xmod": PAD | {"languages": ["en"], "default_language": "en"},
    "bert-generation": {},
    "cpmant": {"dim_head": 16, "dim_ff": 64},
    "xlm": {"pad_token_id": 319},
    "xlnet": {"d_head": 16, "d_inner": 64},
    "mllama": {},
    "bart": {},
    "t5": {},
    "vit": {},
}
"""Families that are refused by their config.json: how their configs differ from that of Llama."""
