"""The Arrow columns of every data set between two stages, and the one codec of log-probabilities.

Length words: T, the tokens of the row (its start token and, where the document ends, its EOS
included); k, `capture.top_k`, none for `signal: sampled`; m, `capture.draws`, none for `signal:
top_k`. Position t of a row always speaks of token t+1.
"""

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int, UInt8

SCHEMA_VERSION = 4


def _list_of(kind: pa.DataType) -> pa.DataType:
    """Return the type of lists without gaps: a third less time to read than of lists with."""
    return pa.list_(pa.field("element", kind, nullable=False))


ints = _list_of(pa.int32())
halfs = _list_of(pa.float16())
codes = _list_of(pa.uint8())
flags = _list_of(pa.bool_())
floats = _list_of(pa.float32())

CORPUS = pa.schema(
    {
        "row_id": pa.string(),  # DOC_ID#PLACE, the row's place in its document
        "doc_id": pa.string(),
        "domain": pa.string(),  # "" where the documents name none
        "text": pa.string(),
        "num_bytes": pa.int32(),  # of the text in UTF-8
        "ends_document": pa.bool_(),  # the document's last row: its tokens end with EOS
        "target_ids": ints,  # T: the text in the target's tokens, as trained on
    }
)

CAPTURED = pa.schema(
    {
        "row_id": pa.string(),  # as in the corpus, same order
        "token_ids": ints,  # T: the text in the source's own tokens; empty if rejected
        "top_ids": ints,  # T*k, flat: likeliest first; -1 beyond the vocabulary
        "top_logprobs": codes,  # T*k, flat: encode_logprobs; natural log, whole vocabulary
        "tail_logprobs": halfs,  # T: log of the mass outside the top k
        "draw_ids": ints,  # T*m, flat: tokens drawn from that mass, each once; -1 beyond them
        "draw_counts": codes,  # T*m, flat: how often each was drawn, m in all: mass / m each time
        "next_logprobs": halfs,  # T: of the token that really comes next; 0 at the last
        "nats": pa.float32(),  # -sum of next_logprobs over the text, EOS left out; inf if rejected
    }
)

ALIGNED = pa.schema(
    {
        "row_id": pa.string(),
        "has_signal": flags,  # T, in the target's tokens: the source says something here
        "top_ids": ints,  # T*(k+m), flat, target tokens: likeliest first, -1 beyond them
        "top_logprobs": codes,  # T*(k+m), flat
        "tail_logprobs": halfs,  # T
        "nats_per_byte": halfs,  # T: the source's cost of token t+1's bytes, per byte
        "nats": pa.float32(),  # as captured
        "num_tokens": pa.int32(),  # the source's own tokens of the row's text, EOS left out
    }
)

TOKEN_COSTS = pa.schema(
    {
        "row_id": pa.string(),  # as in the held-out rows, same order
        "ends": ints,  # the byte of the text after each token: start token and EOS left out
        "nats": floats,  # of each of these tokens: -log of its probability
    }
)

# 255 steps between ln p = 0 and ln p = -20, finer near 0, where the mass is: half the bytes of
# float16, for a mean KL below 1e-4 nats a token (benchmarks/record_size.py).
_DEEPEST = 20.0
_SCALE = np.log1p(_DEEPEST)
PROB_OF_CODE = np.exp(-np.expm1(np.arange(256) / 255 * _SCALE)).astype(np.float32)
"""What each code stands for, before a head is scaled to its mass."""

LOWEST_LOGPROB = -_DEEPEST
"""What a log-probability is cut to in storage: 2e-9."""

# A float32 read as an integer grows with its value, and all but its last 12 bits, 2,048 steps to
# each factor of two, are enough to tell its code: one look-up in place of two logarithms.
_DROPPED_BITS = np.uint32(12)


def _tabulate_codes() -> UInt8[np.ndarray, " steps"]:
    """Return the code of the probabilities in each step: round(255 ln(1 - ln p) / ln 21)."""
    steps = np.arange((np.float32(1).view(np.uint32) >> _DROPPED_BITS) + 1, dtype=np.uint32)
    middles = (steps << _DROPPED_BITS) + (1 << (_DROPPED_BITS - np.uint32(1)))
    logs = np.log(middles.view(np.float32).astype(np.float64))
    logs = np.clip(logs, LOWEST_LOGPROB, 0.0)
    return np.rint(np.log1p(-logs) * (255 / _SCALE)).astype(np.uint8)


_CODE_OF_STEP = _tabulate_codes()


def encode_probs(probs: Float[np.ndarray, "positions top_k"]) -> UInt8[np.ndarray, " flat"]:
    """Return sorted probabilities as one byte each: the first code, then differences.

    The codes of a row never decrease, so that the differences are never negative. Probabilities
    below 2e-9, and entries that are not there, cost the highest code.

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
    """Return the float32 probabilities that `encode_probs` stored, summing to 1 with the tail.

    Each row's head is scaled to 1 - exp(tail), so the codec's rounding cannot make or lose mass.
    The result's columns lie contiguous in memory, one entry of all positions after the other.

    Args:
        differences: The stored bytes, positions * top_k of them.
        top_ids: The ids stored beside them; where one is -1 the result is 0.
        tail_logprobs: Natural log of the mass outside the head.
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
    """Return a list column's flat values and the offsets of its rows, without Python lists."""
    column = table.column(name).combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # no rows at all
        column = pa.array([], type=table.schema.field(name).type)
    offsets = column.offsets.to_numpy()
    values = column.flatten().to_numpy(zero_copy_only=False)
    return values, offsets - offsets[0]


def build_list_column(
    values: np.ndarray, offsets: Int[np.ndarray, " rows_plus_1"], list_type: pa.DataType
) -> pa.ListArray:
    """Return a list column from flat values and row offsets."""
    flat = pa.array(values, type=list_type.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), flat, type=list_type)
