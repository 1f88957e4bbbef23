"""Draws from a source's distribution: an unbiased record where the top k alone is not.

RS-KD (arXiv 2503.16870) draws independently. Here the draws are stratified: the cumulative
distribution is cut into m equal parts, and one point is drawn from each. A token of probability p
is drawn m * p times on average, as there, and whatever is summed over the draws varies less.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8


@dataclass(frozen=True)
class Draws:
    """What was drawn at each position of one row."""

    ids: Int[np.ndarray, "seq_len draws"]
    """The distinct tokens in order of id; -1 beyond them."""
    counts: UInt8[np.ndarray, "seq_len draws"]
    """How often each was drawn; together all draws, or none where nothing is left to draw from."""


def make_noise(
    rows: Sequence[Int[np.ndarray, " _"]], num_draws: int, salt: str
) -> Float[torch.Tensor, "positions draws"]:
    """Return a number in [0, 1) for each draw at each position of rows, one row after the other.

    A row's numbers follow from its tokens and the salt alone: whoever scores it again, in whatever
    batch, draws the same.
    """
    parts: list[np.ndarray] = []
    for row in rows:
        digest = hashlib.sha256(salt.encode() + row.astype("<i4").tobytes()).digest()
        random = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        parts.append(random.random((len(row), num_draws), dtype=np.float32))
    return torch.from_numpy(np.concatenate(parts))


def draw_ids(
    logits: Float[torch.Tensor, "positions vocab"],
    noise: Float[torch.Tensor, "positions draws"],
) -> Int[torch.Tensor, "positions draws"]:
    """Return token ids drawn from softmax(logits), in order of id; -1 where no logit is finite.

    Args:
        logits: -inf for what is not to be drawn.
        noise: In [0, 1), the place of each draw in its part.
    """
    upto = logits.softmax(1).cumsum(1)
    total = upto[:, -1:]
    num_draws = noise.shape[1]
    points = (noise + torch.arange(num_draws, device=logits.device)) / max(num_draws, 1) * total
    # Rounding may put the last point on the total, behind every token.
    points = torch.minimum(points, torch.nextafter(total, torch.zeros_like(total)))
    ids = torch.searchsorted(upto, points, right=True)
    return ids.masked_fill(~(total > 0), -1)


def count_draws(ids: Int[np.ndarray, "seq_len draws"]) -> Draws:
    """Return draws with each token once.

    Args:
        ids: In order of id; -1 for nothing drawn.
    """
    is_new = np.diff(ids, axis=1, prepend=-2) != 0
    place = is_new.cumsum(axis=1) - 1
    flat_place = place + np.arange(len(ids))[:, None] * ids.shape[1]
    distinct = np.full(ids.shape, -1, dtype=np.int32)
    np.put_along_axis(distinct, place, ids.astype(np.int32), axis=1)
    counts = np.bincount(flat_place[ids >= 0], minlength=ids.size)
    return Draws(distinct, counts.reshape(ids.shape).astype(np.uint8))
