"""Decoded rows as flat arrays, which become dictionaries or an Arrow table."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int

LEARNED = "is_learned"
"""A column more of conversations: whether the token after each is learned."""


@dataclass(frozen=True)
class RowBlock:
    """Some rows of a view."""

    lengths: Int[np.ndarray, " rows"]
    """Tokens of each row; 0 for a row that its source rejected."""
    per_row: Mapping[str, np.ndarray]
    """Columns with one value for each row."""
    per_token: Mapping[str, np.ndarray]
    """Columns with one value, or one vector, for each token; the rows follow one another."""

    @property
    def offsets(self) -> Int[np.ndarray, " rows_plus_1"]:
        """Where the tokens of each row start and end."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def iterate(self) -> Iterator[dict[str, Any]]:
        """Yield each row as a dictionary: plain values, and arrays of [tokens] or [tokens, k]."""
        offsets = self.offsets
        values = {name: column.tolist() for name, column in self.per_row.items()}
        for row in range(len(self.lengths)):
            part = slice(offsets[row], offsets[row + 1])
            yield {name: column[row] for name, column in values.items()} | {
                name: column[part] for name, column in self.per_token.items()
            }

    def to_arrow(self) -> pa.Table:
        """Convert to a table: a list for each array, a list of lists for one of [tokens, k]."""
        columns: dict[str, pa.Array] = {
            name: pa.array(column) for name, column in self.per_row.items()
        }
        for name, column in self.per_token.items():
            values: pa.Array = pa.array(np.ascontiguousarray(column).reshape(-1))
            if column.ndim == 2:
                starts = np.arange(len(column) + 1) * column.shape[1]
                values = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), values)
            columns[name] = pa.ListArray.from_arrays(pa.array(self.offsets, pa.int32()), values)
        return pa.table(columns)
