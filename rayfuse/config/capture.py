"""How each source is run over the corpus."""

from typing import Annotated, Literal

from pydantic import (
    Field,
    PositiveInt,
    model_validator,
)

from rayfuse.config.base import Settings, Share, result_neutral

MAX_ENTRIES = 255
"""Maximum entries at a position: alignment numbers them in 8 bits."""


class CaptureSettings(Settings):
    """How each source LLM is run over the corpus."""

    signal: Literal["top_k", "sampled", "top_k_and_sampled_tail"] = "top_k"
    """What is stored of each distribution. `top_k`: the likeliest tokens and the mass outside them.
    `sampled`: random draws from the distribution. `top_k_and_sampled_tail`: the likeliest tokens,
    and draws from the rest. Draws are unbiased, whatever the target predicts for the tail."""
    top_k: Annotated[int, Field(ge=1, le=MAX_ENTRIES)] = 16
    """Log-probabilities stored per position, 255 at most; the rest becomes one tail mass."""
    draws: Annotated[int, Field(ge=1, le=128)] = 12
    """Draws per position, if the signal has draws."""
    batch_tokens: PositiveInt = result_neutral(16_384)
    """Tokens in one forward pass, padding counted; raise it until the GPU's memory is used."""
    chunk_positions: PositiveInt = result_neutral(1024)
    """Positions whose logits are in memory at a time."""
    max_rejected_share: Share = result_neutral(0.01)
    """Maximum share of a source's rows that may be rejected before the run stops."""

    @model_validator(mode="after")
    def _check_entries(self) -> "CaptureSettings":
        if self.kept_entries + self.num_draws > MAX_ENTRIES:
            raise ValueError(
                f"top_k {self.top_k} and draws {self.draws} are more than {MAX_ENTRIES} entries "
                "of a position; lower one of them"
            )
        return self

    @property
    def kept_entries(self) -> int:
        """The number of likeliest tokens stored per position."""
        return 0 if self.signal == "sampled" else self.top_k

    @property
    def num_draws(self) -> int:
        """The number of draws per position."""
        return 0 if self.signal == "top_k" else self.draws
