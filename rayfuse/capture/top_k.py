"""Hidden states -> the top-k and sampled record; the full logits of a batch never exist at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from rayfuse.capture.sampling import draw_ids
from rayfuse.models.causal_lm import CausalLM
from rayfuse.models.head_product import log_normaliser

MIN_RESOLVED_TAIL = 1e-7
"""The smallest tail mass stored: a sum of float32 probabilities near 1 is no more exact than this,
so a smaller difference from 1 is rounding."""


@dataclass(frozen=True)
class TopLogprobs:
    """What a source predicts at some positions; in numpy, or in torch where the model is."""

    top_ids: Int[Any, "positions top_k"]
    """Likeliest first; -1 where the vocabulary has fewer than k tokens."""
    top_logprobs: Float[Any, "positions top_k"]
    """Natural log, normalised over the whole vocabulary, temperature 1."""
    tail_logprobs: Float[Any, " positions"]
    """Log of the mass outside the top k."""
    next_logprobs: Float[Any, " positions"]
    """Of the token that really comes next; 0 at a row's last position, which has none."""
    drawn_ids: Int[Any, "positions draws"]
    """Tokens drawn from the tail in order of id, with repeats; -1 where the tail has no mass, no
    columns where nothing is drawn."""

    def map(self, function: Callable[[Any], Any]) -> "TopLogprobs":
        """Apply a function to every array."""
        return TopLogprobs(*(function(array) for array in vars(self).values()))

    def split_rows(self, lengths: Sequence[int]) -> list["TopLogprobs"]:
        """Split a record in torch, on the host, into one record in numpy per row.

        Args:
            lengths: The positions of each row; together, all positions.
        """
        ends = np.cumsum(lengths)[:-1]
        columns = [np.split(tensor.numpy(), ends) for tensor in vars(self).values()]
        return [TopLogprobs(*arrays) for arrays in zip(*columns, strict=True)]

    def is_finite(self) -> bool:
        """Check that the model's outputs were neither NaN nor infinite."""
        return bool(
            np.isfinite(self.next_logprobs).all()
            and np.isfinite(self.top_logprobs[self.top_ids >= 0]).all()
        )


def join_records(parts: Sequence[TopLogprobs]) -> TopLogprobs:
    """Concatenate records in numpy of positions that follow one another."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return TopLogprobs(*(np.concatenate(arrays) for arrays in columns))


@torch.inference_mode()
def keep_top_k(
    hidden: Float[torch.Tensor, "positions width"],
    lm: CausalLM,
    known_ids: Bool[torch.Tensor, " head_width"],
    next_ids: Int[torch.Tensor, " positions"],
    noise: Float[torch.Tensor, "positions draws"],
    *,
    top_k: int,
    chunk_positions: int,
) -> TopLogprobs:
    """Reduce each position's distribution to its record, applying the head chunk by chunk.

    Args:
        hidden: The head's inputs.
        lm: The model that the head belongs to.
        known_ids: Head rows that the tokenizer has; the others, which padding may have left with
            any weights, are masked before normalising.
        next_ids: The token that comes next at each position; -1 where none does.
        noise: In [0, 1), for draws from the tail.
        top_k: Entries kept; 0 for none.
        chunk_positions: Positions per chunk; full logits exist for one chunk at a time.
    """
    unknown_ids = torch.nonzero(~known_ids)[:, 0]
    parts = [
        _reduce_chunk(lm.logits(part), unknown_ids, part_next_ids, part_noise, top_k)
        for part, part_next_ids, part_noise in zip(
            hidden.split(chunk_positions),
            next_ids.split(chunk_positions),
            noise.split(chunk_positions),
            strict=True,
        )
    ]
    return TopLogprobs(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _reduce_chunk(
    logits: Float[torch.Tensor, "positions head_width"],
    unknown_ids: Int[torch.Tensor, " unknown"],
    next_ids: Int[torch.Tensor, " positions"],
    noise: Float[torch.Tensor, "positions draws"],
    top_k: int,
) -> tuple[torch.Tensor, ...]:
    """Reduce logits, which are overwritten, to the fields of `TopLogprobs`."""
    logits.index_fill_(1, unknown_ids, -torch.inf)
    normaliser = log_normaliser(logits)
    next_logprobs = (logits.gather(1, next_ids.clamp(min=0)[:, None]) - normaliser)[:, 0]
    top = logits.topk(min(top_k, logits.shape[1]), dim=1)
    logprobs = top.values - normaliser
    ids = top.indices.masked_fill(top.values == -torch.inf, -1)
    missing = top_k - ids.shape[1]
    if missing:
        ids = nn.functional.pad(ids, (0, missing), value=-1)
        logprobs = nn.functional.pad(logprobs, (0, missing), value=-torch.inf)
    # In float64: the difference from 1 would lose what the sum's float32 rounding is.
    tail = (1 - logprobs.double().exp().sum(1)).clamp(min=MIN_RESOLVED_TAIL).log()
    drawn_ids = ids[:, :0]
    if noise.shape[1]:
        # The draws are from the tail alone, so the top k are masked too.
        drawn_ids = draw_ids(logits.scatter_(1, top.indices, -torch.inf), noise)
    return (
        ids.int(),  # 32 bits, before the copy to the host
        logprobs,
        tail.float(),
        next_logprobs.masked_fill(next_ids < 0, 0.0),
        drawn_ids.int(),
    )
