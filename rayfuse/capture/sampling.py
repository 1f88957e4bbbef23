"""Draws from a source's distribution: an unbiased record where the top k alone is biased.

RS-KD (Random Sampling Knowledge Distillation, arXiv 2503.16870) draws independently. Here the draws
are stratified: the cumulative distribution is cut into m equal parts, and one point is drawn from
each. A token of probability p is drawn m * p times on average, as in RS-KD, and any sum over the
draws has a lower variance.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8


def make_noise(
    rows: Sequence[Int[np.ndarray, " _"]], num_draws: int, salt: str
) -> Float[torch.Tensor, "positions draws"]:
    """Generate one number in [0, 1) per draw at each position of the rows, one row after the other.

    A row's numbers follow from its tokens and the salt alone, so that a row scored again, in any
    batch, gets the same draws.

    Args:
        rows: Token ids.
        num_draws: Draws per position.
        salt: Identifies the model: two models draw independently on the same row.
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
    """Draw token ids from softmax(logits), in order of id; -1 where no logit is finite.

    Args:
        logits: -inf for tokens that are not to be drawn.
        noise: In [0, 1), the place of each draw in its part of the cumulative distribution.
    """
    cumulative = logits.softmax(1).cumsum(1)
    total = cumulative[:, -1:]
    num_draws = noise.shape[1]
    points = (noise + torch.arange(num_draws, device=logits.device)) / max(num_draws, 1) * total
    # Rounding may put the last point on the total, which lies behind every token.
    points = torch.minimum(points, torch.nextafter(total, torch.zeros_like(total)))
    ids = torch.searchsorted(cumulative, points, right=True)
    return ids.masked_fill(~(total > 0), -1)


def count_draws(
    drawn_ids: Int[np.ndarray, "positions draws"],
) -> tuple[Int[np.ndarray, "positions draws"], UInt8[np.ndarray, "positions draws"]]:
    """Count how often each token was drawn.

    Args:
        drawn_ids: In order of id, with repeats; -1 for no draw.

    Returns:
        The distinct ids in order, -1 beyond them, and the count of each, 0 beyond them.
    """
    is_new = np.diff(drawn_ids, axis=1, prepend=-2) != 0
    place = is_new.cumsum(axis=1) - 1
    flat_place = place + np.arange(len(drawn_ids))[:, None] * drawn_ids.shape[1]
    distinct = np.full(drawn_ids.shape, -1, dtype=np.int32)
    np.put_along_axis(distinct, place, drawn_ids.astype(np.int32), axis=1)
    counts = np.bincount(flat_place[drawn_ids >= 0], minlength=drawn_ids.size)
    return distinct, counts.reshape(drawn_ids.shape).astype(np.uint8)
