"""Rows into windows and padded batches."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Int


def cut_windows(length: int, context_tokens: int | None) -> list[tuple[slice, slice]]:
    """Return the windows that a row is scored in: of its tokens, and of the window's positions.

    A row that the model takes whole is one window. A longer one is several that overlap by half;
    each position is scored once, in the first window that holds the token after it.

    Args:
        length: The row's tokens.
        context_tokens: The most that the model takes, at least 2; None for no limit.
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
    """Return rows of ids as one tensor, padded on the right with id 0."""
    padded = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return torch.from_numpy(padded)


def batch_by_tokens(lengths: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield batches of row numbers, longest rows first, of at most `batch_tokens` with padding.

    A row longer than that is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batch: list[int] = []
    for index in order:
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
