"""The interface of an engine, which runs one source LLM, and what all engines have in common."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from rayfuse.capture.top_k import TopLogprobs, join_records
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import SourceSettings
from rayfuse.models.batching import cut_windows

TokenRows = Sequence[Int[np.ndarray, " _"]]


@dataclass(frozen=True)
class Failure:
    """The result of a row that could not be scored."""

    reason: str


class EngineMemoryError(RuntimeError):
    """The device is out of memory even for half of one row, so no row is to blame."""


@runtime_checkable
class Engine(Protocol):
    """Scores rows of token ids; holds the weights."""

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch at present: fewer than the recipe's after running out of memory."""
        ...

    def score_rows(self, rows: TokenRows) -> list[TopLogprobs | Failure]:
        """Score rows, and return one result per row in the same order.

        Raises:
            EngineMemoryError: The device is out of memory for every row.
        """
        ...


LoadEngine = Callable[[SourceSettings, CaptureSettings], Engine]


def score_in_windows(
    rows: TokenRows,
    context_tokens: int | None,
    score: Callable[[TokenRows], list[TopLogprobs | Failure]],
) -> list[TopLogprobs | Failure]:
    """Score rows of any length, those beyond the context length in overlapping windows.

    Args:
        rows: Token ids.
        context_tokens: The model's context length; None for no limit.
        score: Scores rows within the context length.

    Returns:
        One result per row, in the same order. A row with a failed window fails.
    """
    windows_of_rows = [cut_windows(len(row), context_tokens) for row in rows]
    texts = [
        row[tokens]
        for row, windows in zip(rows, windows_of_rows, strict=True)
        for tokens, _ in windows
    ]
    results = iter(score(texts))
    return [
        _join_windows([(next(results), kept) for _, kept in windows]) for windows in windows_of_rows
    ]


def _join_windows(windows: list[tuple[TopLogprobs | Failure, slice]]) -> TopLogprobs | Failure:
    parts: list[TopLogprobs] = []
    for result, kept in windows:
        if isinstance(result, Failure):
            return result
        parts.append(result.map(lambda array, kept=kept: array[kept]))
    return join_records(parts)
