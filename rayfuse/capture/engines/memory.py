"""Batches that fit the memory: smaller batches, retries and rejected rows after an OOM error.

Three measures against an out-of-memory (OOM) error, in this order:

1. The batch is halved at once, and later batches have at most the size that fitted.
2. A row that is out of memory on its own is retried after 1, 5 and 25 s, since another process on
   the same device may have freed memory by then.
3. If it still fails, half of it is scored. If the half fits, the row is too long for this device
   and becomes a `Failure`; if not, the device is short of memory and `EngineMemoryError` is raised,
   so that no row is rejected for it.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch

from rayfuse.capture.engines.base import EngineMemoryError, Failure, TokenRows
from rayfuse.capture.top_k import TopLogprobs
from rayfuse.models.batching import batch_by_tokens
from rayfuse.models.out_of_memory import is_out_of_memory

RETRY_SECONDS = (1.0, 5.0, 25.0)
"""Pauses before each retry of a row that is out of memory on its own."""

DEVICE_ERROR = "CUDA error"
"""Start of the errors after which the GPU refuses all further work of this process."""

OUT_OF_MEMORY = Failure("out of memory")

logger = logging.getLogger(__name__)

Results = dict[int, TopLogprobs | Failure]
"""Results by row number."""


@runtime_checkable
class PendingBatch(Protocol):
    """A batch that was handed to the device; its results may not be on the host yet."""

    def wait(self) -> list[TopLogprobs]:
        """Return the result of each row, once it is on the host."""
        ...


class BatchScorer:
    """Scores rows in batches that fit the memory.

    Not thread-safe: both limits change while rows are scored.
    """

    def __init__(
        self,
        score_batch: Callable[[TokenRows], PendingBatch],
        *,
        batch_tokens: int,
        boundaries: Sequence[int] = (),
    ) -> None:
        """Take the function that scores one batch, and the size to start with.

        Args:
            score_batch: Scores rows as one batch; raises an out-of-memory error if it must.
            batch_tokens: Tokens of a batch, padding included.
            boundaries: As for `batch_by_tokens`.
        """
        self.score_batch, self.boundaries = score_batch, boundaries
        self.configured_tokens = batch_tokens
        self.batch_tokens = batch_tokens
        """Tokens of a batch at present; halved after every OOM error."""
        self.too_long_tokens: float = math.inf
        """The shortest row that stayed out of memory: rows of this length are not retried."""

    def score_rows(self, rows: TokenRows) -> list[TopLogprobs | Failure]:
        """Score rows within the context length, and return one result per row in the same order.

        Raises:
            EngineMemoryError: The device has no memory for half of one row.
        """
        batch_tokens = self.batch_tokens
        results = self._score_batches(rows, list(range(len(rows))))
        for seconds in RETRY_SECONDS:
            starved = self._list_retryable(rows, results)
            if not starved:
                break
            time.sleep(seconds)
            results |= self._score_batches(rows, starved)
            if len(self._list_retryable(rows, results)) < len(starved):
                # The shortage was temporary, and with it the reason for smaller batches.
                self.batch_tokens = batch_tokens
        for index in self._list_retryable(rows, results):
            self._learn_row_limit(rows, index)
        return [results[index] for index in range(len(rows))]

    def _list_retryable(self, rows: TokenRows, results: Results) -> list[int]:
        """List the rows that are out of memory and shorter than those known to be too long."""
        return [
            index
            for index, result in results.items()
            if result == OUT_OF_MEMORY and len(rows[index]) < self.too_long_tokens
        ]

    def _learn_row_limit(self, rows: TokenRows, index: int) -> None:
        """Lower the length from which rows are not retried to that of a row.

        Raises:
            EngineMemoryError: Half of the row does not fit either.
        """
        half = rows[index][: max(len(rows[index]) // 2, 1)]
        if any(answer == OUT_OF_MEMORY for _, answer in self._score_parts([half])):
            raise EngineMemoryError(
                f"there is no memory for {len(half)} tokens, {sum(RETRY_SECONDS):.0f} s after it "
                "ran out; free it or give the actors another node, then run the same command again"
            )
        self.too_long_tokens = min(self.too_long_tokens, len(rows[index]))

    def _score_batches(self, rows: TokenRows, indices: list[int]) -> Results:
        """Score some of the rows in batches, each one time."""
        results: Results = {}
        pending: tuple[list[int], PendingBatch] | None = None
        lengths = [len(rows[index]) for index in indices]
        for places in batch_by_tokens(lengths, self.batch_tokens, self.boundaries):
            batch = [indices[place] for place in places]
            for part, answer in self._score_parts([rows[index] for index in batch]):
                if isinstance(answer, Failure):
                    results |= dict.fromkeys(batch[part], answer)
                    continue
                # One batch behind: its results are copied while the device computes this one.
                if pending:
                    results |= _collect(*pending)
                pending = (batch[part], answer)
        if pending:
            results |= _collect(*pending)
        return results

    def _score_parts(self, rows: TokenRows) -> Iterator[tuple[slice, PendingBatch | Failure]]:
        """Score a batch, after an error in halves, and yield each part's rows and results.

        A batch with a row that the model fails on is halved until that row is on its own.
        """
        parts = [slice(0, len(rows))]
        while parts:
            part = parts.pop()
            try:
                pending = self.score_batch(rows[part])
            except (RuntimeError, ValueError, IndexError, MemoryError) as error:
                is_full = is_out_of_memory(error)
                if str(error).startswith(DEVICE_ERROR) and not is_full:
                    raise
                failure = (
                    OUT_OF_MEMORY if is_full else Failure(f"model fails: {_first_line(error)}")
                )
            else:
                yield part, pending
                continue
            # Outside of `except`: the error's frames hold the batch's tensors until it is gone.
            if is_full:
                self._shrink_batches(sum(len(row) for row in rows[part]))
            if part.stop - part.start == 1:
                yield part, failure
            else:
                middle = (part.start + part.stop) // 2
                parts += [slice(middle, part.stop), slice(part.start, middle)]

    def _shrink_batches(self, num_tokens: int) -> None:
        """Limit batches to half of a size that does not fit."""
        if torch.cuda.is_available():
            # Cached blocks of other sizes are unusable for the next try, and for other processes.
            torch.cuda.empty_cache()
        self.batch_tokens = max(min(self.batch_tokens, num_tokens // 2), 1)
        logger.warning(
            "out of memory with %d tokens; batches are cut to %d from here on: lower "
            "capture.batch_tokens (%d)",
            num_tokens,
            self.batch_tokens,
            self.configured_tokens,
        )


def _collect(indices: list[int], pending: PendingBatch) -> Results:
    return dict(zip(indices, pending.wait(), strict=True))


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
