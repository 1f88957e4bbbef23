"""Split rows into windows that fit a model's context, and group rows into padded batches."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Int


def cut_windows(length: int, context_tokens: int | None) -> list[tuple[slice, slice]]:
    """Split a row into the windows that it is scored in.

    A row that fits the model's context is one window. A longer row is split into windows that
    overlap by half. Each position is scored once: in the first window that contains the token
    after it, which gives it at least half of the context.

    Args:
        length: Tokens of the row.
        context_tokens: The model's context length, at least 2; None for no limit.

    Returns:
        For each window, a slice of the row's tokens, and the slice of the positions in the window
        whose scores are kept.
    """
    if context_tokens is None or length <= context_tokens:
        return [(slice(0, length), slice(0, length))]
    windows: list[tuple[slice, slice]] = []
    start = kept = 0
    while True:
        stop = min(start + context_tokens, length)
        is_last = stop == length
        windows.append((slice(start, stop), slice(kept - start, stop - start - (not is_last))))
        if is_last:
            return windows
        start, kept = start + context_tokens // 2, stop - 1


def pad_rows(rows: list[np.ndarray]) -> Int[torch.Tensor, "batch seq_len"]:
    """Stack rows of token ids into one tensor, padded on the right with id 0."""
    padded = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return torch.from_numpy(padded)


def is_same_side(first: int, second: int, boundaries: Sequence[int]) -> bool:
    """Check that two row lengths are on the same side of every boundary, which is below itself."""
    return not any(min(first, second) <= boundary < max(first, second) for boundary in boundaries)


def batch_by_tokens(
    lengths: list[int], batch_tokens: int, boundaries: Sequence[int] = ()
) -> Iterator[list[int]]:
    """Yield batches of row indices, longest rows first, so that little of a batch is padding.

    Args:
        lengths: Tokens of each row.
        batch_tokens: Maximum tokens of a batch, padding included. A longer row is a batch alone.
        boundaries: `CausalLM.length_boundaries`: rows on both sides of one never share a batch.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batch: list[int] = []
    for index in order:
        longest = lengths[batch[0]] if batch else lengths[index]
        is_full = longest * (len(batch) + 1) > batch_tokens
        if batch and (is_full or not is_same_side(longest, lengths[index], boundaries)):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
