"""The one codec of log-probabilities, and Arrow list columns as flat arrays."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int, UInt8


@dataclass(frozen=True)
class TopK:
    """The likeliest next tokens at some positions, and the mass of all others; numpy or torch."""

    ids: Int[Any, "positions top_k"]
    """-1 where there is no entry."""
    probs: Float[Any, "positions top_k"]
    """0 where there is no entry; each position sums to 1 with the tail."""
    tail: Float[Any, " positions"]
    """Probability mass outside the entries."""


@dataclass(frozen=True)
class EncodedTopK:
    """`TopK` as it is stored: one byte a probability, see `encode_probs`."""

    ids: Int[np.ndarray, "positions top_k"]
    codes: UInt8[np.ndarray, "positions top_k"]
    tail_logprobs: Float[np.ndarray, " positions"]
    """Natural log of the mass outside the entries."""


# 255 steps between ln p = 0 and ln p = -20, finer near 0, where the mass is: half the bytes of
# float16, for a mean KL below 1e-4 nats a token (benchmarks/record_size.py).
_DEEPEST = 20.0
_SCALE = np.log1p(_DEEPEST)
PROB_OF_CODE = np.exp(-np.expm1(np.arange(256) / 255 * _SCALE)).astype(np.float32)
"""The probability of each code, before the entries of a position are scaled to their mass."""

LOWEST_LOGPROB = -_DEEPEST
"""Lower bound of stored log-probabilities: p = 2e-9."""

# The bits of a positive float32, read as an integer, grow with its value. Without the last 12 bits
# there are 2,048 steps to each factor of two, which determine the code: one look-up replaces two
# logarithms.
_DROPPED_BITS = np.uint32(12)


def _tabulate_codes() -> UInt8[np.ndarray, " steps"]:
    """Tabulate the code of the probabilities in each step: round(255 ln(1 - ln p) / ln 21)."""
    steps = np.arange((np.float32(1).view(np.uint32) >> _DROPPED_BITS) + 1, dtype=np.uint32)
    middles = (steps << _DROPPED_BITS) + (1 << (_DROPPED_BITS - np.uint32(1)))
    logs = np.log(middles.view(np.float32).astype(np.float64))
    logs = np.clip(logs, LOWEST_LOGPROB, 0.0)
    return np.rint(np.log1p(-logs) * (255 / _SCALE)).astype(np.uint8)


_CODE_OF_STEP = _tabulate_codes()


def encode_probs(probs: Float[np.ndarray, "positions top_k"]) -> UInt8[np.ndarray, " flat"]:
    """Encode sorted probabilities as one byte each: the first code, then differences.

    The codes of a position never decrease, so the differences are never negative. Probabilities
    below 2e-9, and missing entries, have the highest code.

    Args:
        probs: Each row descending.
    """
    steps = np.ascontiguousarray(probs, dtype=np.float32).view(np.uint32) >> _DROPPED_BITS
    levels = _CODE_OF_STEP[steps]
    differences = levels.reshape(-1).copy()
    differences[1:] -= levels.reshape(-1)[:-1]
    differences[:: max(probs.shape[1], 1)] = levels[:, :1].reshape(-1)
    return differences


def decode_probs(
    differences: UInt8[np.ndarray, " flat"],
    top_ids: Int[np.ndarray, "positions top_k"],
    tail_logprobs: Float[np.ndarray, " positions"],
) -> Float[np.ndarray, "positions top_k"]:
    """Decode the float32 probabilities that `encode_probs` stored; they sum to 1 with the tail.

    The entries of each position are scaled to 1 - exp(tail), so the codec's rounding neither adds
    nor loses mass. The result is column-major: all positions of an entry are contiguous.

    Args:
        differences: The stored bytes, positions * top_k of them.
        top_ids: The ids stored beside them; where one is -1 the result is 0.
        tail_logprobs: Natural log of the mass outside the entries.
    """
    levels = differences.reshape(top_ids.shape).T.copy()
    for entry in range(1, len(levels)):
        levels[entry] += levels[entry - 1]
    probs = PROB_OF_CODE[levels]
    probs *= top_ids.T >= 0
    head = -np.expm1(np.minimum(tail_logprobs.astype(np.float32), np.float32(0)))
    probs *= head / np.maximum(probs.sum(axis=0), np.float32(1e-30))
    return probs.T


def flatten_column(
    table: pa.Table, name: str
) -> tuple[np.ndarray, Int[np.ndarray, " rows_plus_1"]]:
    """Flatten a list column to its values and the offsets of its rows, without Python lists."""
    column = table.column(name).combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # no rows at all
        column = pa.array([], type=table.schema.field(name).type)
    offsets = column.offsets.to_numpy()
    values = column.flatten().to_numpy(zero_copy_only=False)
    return values, offsets - offsets[0]


def flatten_positions(table: pa.Table, name: str, tokens: int) -> np.ndarray:
    """Flatten a list column with several entries per token, and reshape it to one row per token.

    Args:
        table: Rows of captured or aligned data.
        name: The column.
        tokens: Tokens of all rows.
    """
    flat = flatten_column(table, name)[0]
    return flat.reshape(tokens, len(flat) // tokens if tokens else 0)


def number_documents(rows: pa.Table) -> Int[np.ndarray, " rows"]:
    """Number each row's document, from 0: a document's rows are consecutive, and its last ends it.

    Not by `doc_id`: files of different origin may use the same ids.

    Args:
        rows: CORPUS rows of one shard, of which `ends_document` is read.
    """
    ends = rows["ends_document"].to_numpy()
    return np.cumsum(ends) - ends


def build_list_column(
    values: np.ndarray, offsets: Int[np.ndarray, " rows_plus_1"], list_type: pa.DataType
) -> pa.ListArray:
    """Build a list column from flat values and row offsets."""
    flat = pa.array(values, type=list_type.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), flat, type=list_type)


def join_ranges(
    starts: Int[np.ndarray, " ranges"], lengths: Int[np.ndarray, " ranges"]
) -> Int[np.ndarray, " total"]:
    """Concatenate the ranges start, start + 1, ..., start + length - 1."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)
