"""The four tiny LLMs of the demo: three sources for one domain each, and the target for all."""

from dataclasses import dataclass
from typing import Literal

CONTEXT_TOKENS = 256
"""Maximum tokens of a row of the demo's corpus."""


@dataclass(frozen=True)
class ModelSpec:
    """The architecture and the training data of one tiny model."""

    name: str
    family: Literal["llama", "neox", "mpt", "gpt2"]
    tokenizer: Literal["sentencepiece", "byte_level"]
    vocab_size: int
    head_width: int
    """Logits per position; those above vocab_size are padding."""
    width: int
    layers: int
    shares: tuple[tuple[str, float], ...]
    """Each domain's share of the tokens."""
    steps: int
    rows_per_step: int = 4
    learning_rate: float = 5e-3
    context_tokens: int = CONTEXT_TOKENS
    """Tokens of a training row, and the context length."""
    head_size: int = 32
    """Width of an attention head."""
    is_tied: bool = False
    """The head has the embedding's weights."""


SOURCES = (
    ModelSpec(
        "llama-code", "llama", "sentencepiece", vocab_size=1536, head_width=1536, width=128,
        layers=4, shares=(("code", 1.0),), steps=2500, is_tied=True,
    ),
    ModelSpec(
        "neox-prose", "neox", "byte_level", vocab_size=1792, head_width=1792, width=128,
        layers=4, shares=(("prose", 1.0),), steps=2000, is_tied=True,
    ),
    ModelSpec(
        "mpt-arithmetic", "mpt", "byte_level", vocab_size=1100, head_width=1152, width=128,
        layers=4, shares=(("arithmetic", 1.0),), steps=2000, is_tied=True,
    ),
)  # fmt: skip
TARGET = ModelSpec(
    "gpt2-target", "gpt2", "byte_level", vocab_size=1280, head_width=1280, width=128,
    layers=2, shares=(("code", 0.34), ("prose", 0.33), ("arithmetic", 0.33)), steps=650,
    is_tied=True,
)  # fmt: skip
