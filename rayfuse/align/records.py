"""A shard's CAPTURED columns as flat arrays; sampled tokens become entries."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int, UInt8

from rayfuse.storage.codec import (
    LOWEST_LOGPROB,
    EncodedTopK,
    decode_probs,
    encode_probs,
    flatten_column,
    flatten_positions,
)

SLICE_POSITIONS = 8_192
"""Positions mapped or decoded at a time: few enough for a core's own cache."""


@dataclass(frozen=True)
class SourceRecords:
    """What one source predicted at every token of a shard, as stored."""

    top: EncodedTopK
    next_logprobs: Float[np.ndarray, " tokens"]
    """Of the token that really comes next."""
    log_totals: Float[np.ndarray, " tokens_plus_1"]
    """Sums of next_logprobs before each token: differences are chain log-probabilities."""
    has_draws: bool
    """Entries are unbiased samples; selecting by values that were not sampled would bias them."""
    head: EncodedTopK
    """The natural top k without draws: nothing of it is random or depends on what follows."""


def read_records(captured: pa.Table) -> SourceRecords:
    """Read the records of CAPTURED rows."""
    tokens = len(flatten_column(captured, "token_ids")[0])
    top_ids, top_codes, draw_ids, draw_counts = (
        flatten_positions(captured, name, tokens)
        for name in ("top_ids", "top_logprobs", "draw_ids", "draw_counts")
    )
    head = EncodedTopK(top_ids, top_codes, flatten_column(captured, "tail_logprobs")[0])
    has_draws = draw_ids.shape[1] > 0
    top = _weigh_draws(head, draw_ids, draw_counts) if has_draws else head
    next_logprobs = flatten_column(captured, "next_logprobs")[0].astype(np.float32)
    return SourceRecords(
        top=top,
        next_logprobs=next_logprobs,
        log_totals=np.concatenate([[0.0], np.cumsum(next_logprobs, dtype=np.float64)]),
        has_draws=has_draws,
        head=head,
    )


def check_entries(
    top_ids: Int[np.ndarray, "tokens top_k"],
    offsets: Int[np.ndarray, " rows_plus_1"],
    vocab_size: int,
) -> None:
    """Check that every entry is a token of the source, or -1.

    Raises:
        ValueError: One is not; the message names row and position.
    """
    if top_ids.size and (top_ids.max() >= vocab_size or top_ids.min() < -1):
        at = int(np.flatnonzero(((top_ids >= vocab_size) | (top_ids < -1)).any(axis=1))[0])
        row = int(np.searchsorted(offsets, at, side="right")) - 1
        raise ValueError(
            f"row {row}, position {at - offsets[row]}: top_ids {top_ids[at].tolist()} are outside "
            f"the vocabulary of {vocab_size}"
        )


def _weigh_draws(
    top: EncodedTopK,
    draw_ids: Int[np.ndarray, "tokens draws"],
    draw_counts: UInt8[np.ndarray, "tokens draws"],
) -> EncodedTopK:
    """Make drawn tokens entries.

    Mass is conserved because the draws share the tail's mass by their counts, and the tail is then
    empty; a position without draws keeps its tail.
    """
    tokens, num_entries = len(top.ids), top.ids.shape[1] + draw_ids.shape[1]
    ids = np.empty((tokens, num_entries), dtype=np.int32)
    codes = np.empty((tokens, num_entries), dtype=np.uint8)
    tails = np.empty_like(top.tail_logprobs)
    for start in range(0, tokens, SLICE_POSITIONS):
        part = slice(start, start + SLICE_POSITIONS)
        tail_logprobs = top.tail_logprobs[part]
        head = decode_probs(top.codes[part].reshape(-1), top.ids[part], tail_logprobs)
        num_drawn = draw_counts[part].sum(axis=1, keepdims=True)
        share = np.exp(tail_logprobs.astype(np.float32))[:, None] / np.maximum(num_drawn, 1)
        probs = np.concatenate([head, draw_counts[part] * share], axis=1, dtype=np.float32)
        order = np.argsort(-probs, axis=1, kind="stable")
        both = np.concatenate([top.ids[part], draw_ids[part]], axis=1)
        ids[part] = np.take_along_axis(both, order, axis=1)
        codes[part] = encode_probs(np.take_along_axis(probs, order, axis=1)).reshape(probs.shape)
        tails[part] = np.where(num_drawn[:, 0] > 0, LOWEST_LOGPROB, tail_logprobs)
    return EncodedTopK(ids, codes, tails)
