"""Hidden states -> top-k and sampled records; the full logits are never there at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from rayfuse.capture.sampling import Draws, count_draws, draw_ids
from rayfuse.models.causal_lm import CausalLM

MIN_TAIL = 1e-7
"""Below it a float32 sum near 1 says nothing of what is missing."""


@dataclass(frozen=True)
class TopLogprobs:
    """What a source says of each position of one row."""

    top_ids: Int[np.ndarray, "seq_len top_k"]
    """Likeliest first; -1 where the vocabulary has fewer than k tokens."""
    top_logprobs: Float[np.ndarray, "seq_len top_k"]
    """Natural log, normalised over the whole vocabulary, temperature 1."""
    tail_logprobs: Float[np.ndarray, " seq_len"]
    """Log of the mass outside the top k."""
    next_logprobs: Float[np.ndarray, " seq_len"]
    """Of the token that really comes next; 0 at the last position, which has none."""
    draws: Draws | None = None
    """From the tail; None where nothing is drawn."""

    def part(self, positions: slice) -> "TopLogprobs":
        """Return the record of some positions."""
        draws = self.draws
        return TopLogprobs(
            self.top_ids[positions],
            self.top_logprobs[positions],
            self.tail_logprobs[positions],
            self.next_logprobs[positions],
            draws and Draws(draws.ids[positions], draws.counts[positions]),
        )

    def is_finite(self) -> bool:
        """Return whether the model gave numbers and no NaN."""
        return bool(
            np.isfinite(self.next_logprobs).all()
            and np.isfinite(self.top_logprobs[self.top_ids >= 0]).all()
        )


def join_parts(parts: Sequence[TopLogprobs]) -> TopLogprobs:
    """Return the record of positions that follow one another."""
    if len(parts) == 1:
        return parts[0]
    draws = [part.draws for part in parts if part.draws is not None]
    return TopLogprobs(
        np.concatenate([part.top_ids for part in parts]),
        np.concatenate([part.top_logprobs for part in parts]),
        np.concatenate([part.tail_logprobs for part in parts]),
        np.concatenate([part.next_logprobs for part in parts]),
        Draws(
            np.concatenate([each.ids for each in draws]),
            np.concatenate([each.counts for each in draws]),
        )
        if draws
        else None,
    )


@dataclass(frozen=True)
class TopTensors:
    """The record of some positions, where the model is."""

    top_ids: Int[torch.Tensor, "positions top_k"]
    top_logprobs: Float[torch.Tensor, "positions top_k"]
    tail_logprobs: Float[torch.Tensor, " positions"]
    next_logprobs: Float[torch.Tensor, " positions"]
    drawn_ids: Int[torch.Tensor, "positions draws"]
    """In order of id, with repeats; no columns where nothing is drawn."""

    def split_rows(self, lengths: Sequence[int]) -> list[TopLogprobs]:
        """Return each row's record, on the host.

        Args:
            lengths: The positions of each row; together, all positions.
        """
        ends = np.cumsum(lengths)[:-1]
        ids, logprobs, tails, following, drawn = (
            np.split(tensor.numpy(), ends)
            for tensor in (
                *(self.top_ids.int(), self.top_logprobs),
                *(self.tail_logprobs, self.next_logprobs, self.drawn_ids),
            )
        )
        draws = [count_draws(row) if row.shape[1] else None for row in drawn]
        rows = zip(ids, logprobs, tails, following, draws, strict=True)
        return [TopLogprobs(*row) for row in rows]


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
) -> TopTensors:
    """Return the record of positions, applying the head to a chunk of them at a time.

    Args:
        hidden: The head's inputs.
        lm: The model, whose head it is.
        known_ids: Head rows that the tokenizer has; the others are masked before normalising.
        next_ids: The token that comes next at each position; -1 where none does.
        noise: In [0, 1), for draws from what is not kept.
        top_k: Entries kept; 0 for none.
        chunk_positions: Positions whose logits exist at a time.
    """
    unknown_ids = torch.nonzero(~known_ids)[:, 0]
    parts = [
        _reduce_chunk(lm.logits(part), unknown_ids, following, chances, top_k)
        for part, following, chances in zip(
            hidden.split(chunk_positions),
            next_ids.split(chunk_positions),
            noise.split(chunk_positions),
            strict=True,
        )
    ]
    return TopTensors(*(torch.cat(pieces) for pieces in zip(*parts, strict=True)))


def _reduce_chunk(
    logits: Float[torch.Tensor, "positions head_width"],
    unknown_ids: Int[torch.Tensor, " unknown"],
    next_ids: Int[torch.Tensor, " positions"],
    noise: Float[torch.Tensor, "positions draws"],
    top_k: int,
) -> tuple[torch.Tensor, ...]:
    logits.index_fill_(1, unknown_ids, -torch.inf)
    normaliser = logits.logsumexp(1, keepdim=True)
    following = logits.gather(1, next_ids.clamp(min=0)[:, None]) - normaliser
    top = logits.topk(min(top_k, logits.shape[1]), dim=1)
    logprobs = top.values - normaliser
    ids = top.indices.masked_fill(top.values == -torch.inf, -1)
    missing = top_k - ids.shape[1]
    if missing:
        ids = nn.functional.pad(ids, (0, missing), value=-1)
        logprobs = nn.functional.pad(logprobs, (0, missing), value=-torch.inf)
    tail = (1 - logprobs.double().exp().sum(1)).clamp(min=MIN_TAIL).log()
    drawn = ids[:, :0]
    if noise.shape[1]:
        drawn = draw_ids(logits.scatter_(1, top.indices, -torch.inf), noise)
    return ids, logprobs, tail.float(), following[:, 0].masked_fill(next_ids < 0, 0.0), drawn
