"""Set-ups to plan without any file."""

from typing import Any

from rayfuse.config.load import read_values
from rayfuse.config.overrides import RecipeError
from rayfuse.config.recipe import Recipe

LLAMA_7B = {"parameters": 6_738_415_616, "layers": 32, "width": 4096, "vocab": 32_000}
MPT_7B = {
    "parameters": 6_649_286_656,
    "layers": 32,
    "width": 4096,
    "vocab": 50_432,
    "is_tied": True,
}

EXAMPLES: dict[str, dict[str, Any]] = {
    "fusellm": {
        "storage": "s3://my-bucket/fusellm",
        "fusion": "paper",
        "corpus": {"documents": "s3://my-bucket/minipile/*.parquet", "max_tokens": 2048},
        "target": {"model": "meta-llama/Llama-2-7b-hf"},
        "sources": [
            {"name": "llama-2", "model": "meta-llama/Llama-2-7b-hf", "max_actors": 8},
            {"name": "openllama", "model": "openlm-research/open_llama_7b_v2", "max_actors": 8},
            {"name": "mpt", "model": "mosaicml/mpt-7b", "max_actors": 8},
        ],
        "train": {"num_workers": 8, "gradient_checkpointing": True},
        "plan": {
            "tokens": 1.8e9,
            "models": {
                "target": LLAMA_7B,
                "llama-2": LLAMA_7B,
                "openllama": LLAMA_7B,
                "mpt": MPT_7B,
            },
        },
    }
}
"""FuseLLM's own (arXiv 2401.10491, section 4.1): 1.8 billion tokens of MiniPile, top 10, mined."""


def read_example(name: str, overrides: list[str]) -> Recipe:
    """Return the recipe of an example, with `section.key=value` overrides applied.

    Raises:
        RecipeError: There is no such example, or a setting is unknown or wrong.
    """
    if name not in EXAMPLES:
        raise RecipeError(f"there is no example {name!r}; use {', '.join(EXAMPLES)}")
    return read_values(EXAMPLES[name], overrides)
