"""What a store has of one text, in the same form whatever tool wrote it."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int, Int32, Num


@dataclass(frozen=True)
class ForeignRow:
    """The distributions of one text. Position t predicts token t+1."""

    top_ids: Int[np.ndarray, "positions entries"]
    """Likeliest first; -1 beyond a position's entries. Without any, it has no distribution."""
    top_logprobs: Float[np.ndarray, "positions entries"]
    """Natural log, temperature 1, over the whole vocabulary; -inf where there is no entry."""
    tail_logprobs: Float[np.ndarray, " positions"]
    """Log of the mass outside the entries, as the store has it or as it was derived."""
    next_logprobs: Float[np.ndarray, " positions"]
    """Of the token that really comes next; NaN where the store has none."""


@runtime_checkable
class Format(Protocol):
    """The layout of a tool's store."""

    @property
    def name(self) -> str:
        """The tool and the layout."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that hold distributions."""
        ...

    @property
    def top_k(self) -> int:
        """The most entries of a position."""
        ...

    @property
    def lacks(self) -> tuple[str, ...]:
        """What the store does not have, each with what is done about it."""
        ...

    def decode(self, table: pa.Table, row: int) -> ForeignRow:
        """Decode the distributions of a row of a file.

        Raises:
            ValueError: They do not have the layout, or are not finite.
        """
        ...


def clip_ids(ids: Num[np.ndarray, "positions entries"]) -> Int32[np.ndarray, "positions entries"]:
    """Convert ids to int32; those that it cannot hold become -1, as they are no tokens.

    Their mass joins the tail when the row is converted.
    """
    wide = ids.astype(np.int64)
    return np.where((wide >= 0) & (wide < 2**31), wide, -1).astype(np.int32)


def sort_entries(
    ids: Int[np.ndarray, "positions entries"], logprobs: Float[np.ndarray, "positions entries"]
) -> tuple[Int[np.ndarray, "positions entries"], Float[np.ndarray, "positions entries"]]:
    """Sort the entries of each position, likeliest first; missing ones, of -inf, are last."""
    order = np.argsort(-logprobs, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
