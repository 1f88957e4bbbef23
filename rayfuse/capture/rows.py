"""Records -> CAPTURED rows: same rows, same order, nothing padded."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from rayfuse.capture.engines.base import Failure
from rayfuse.capture.top_k import TopLogprobs
from rayfuse.models.tokenizer import TextTokenizer
from rayfuse.schema import CAPTURED, codes, halfs, ints
from rayfuse.storage.codec import build_list_column, encode_probs
from rayfuse.storage.dataset import Reject

NOT_FINITE = "log-probabilities are not finite"


def tokenise_rows(corpus: pa.Table, tokenizer: TextTokenizer) -> list[Int[np.ndarray, " _"]]:
    """Return the source's own tokens of each corpus row, start token and EOS included."""
    return tokenizer.encode_rows(corpus["text"].to_pylist(), corpus["ends_document"].to_pylist())


def build_captured(
    corpus: pa.Table,
    token_rows: Sequence[Int[np.ndarray, " _"]],
    records: Sequence[TopLogprobs | Failure],
    eos_id: int | None,
) -> tuple[pa.Table, list[Reject]]:
    """Return the CAPTURED rows, and the rows that had to be left empty.

    Args:
        corpus: The CORPUS rows.
        token_rows: Their tokens.
        records: What the source said of them.
        eos_id: The source's EOS, which ends rows that end documents.
    """
    row_ids: list[str] = corpus["row_id"].to_pylist()
    reasons = [_find_fault(record) for record in records]
    is_good = [reason is None for reason in reasons]
    rejects = [
        Reject(row_id, reason)
        for row_id, reason in zip(row_ids, reasons, strict=True)
        if reason is not None
    ]
    kept = [
        record
        for record, good in zip(records, is_good, strict=True)
        if good and isinstance(record, TopLogprobs)
    ]
    lengths = [len(tokens) if good else 0 for tokens, good in zip(token_rows, is_good, strict=True)]
    top_k = kept[0].top_ids.shape[1] if kept else 0
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    draws = [record.draws for record in kept if record.draws is not None]
    num_draws = draws[0].ids.shape[1] if draws else 0
    tokens = _join([t for t, good in zip(token_rows, is_good, strict=True) if good], np.int32)
    next_logprobs = _join([record.next_logprobs for record in kept], np.float32)
    # Known from the corpus alone: a literal `</s>` that ends a text may have the same id.
    has_eos = np.array(corpus["ends_document"].to_pylist(), dtype=bool) & (eos_id is not None)
    columns = {
        "row_id": pa.array(row_ids, type=pa.string()),
        "token_ids": build_list_column(tokens, offsets, ints),
        "top_ids": build_list_column(
            _join([record.top_ids.reshape(-1) for record in kept], np.int32), offsets * top_k, ints
        ),
        "top_logprobs": build_list_column(
            _join([encode_probs(np.exp(record.top_logprobs)) for record in kept], np.uint8),
            offsets * top_k,
            codes,
        ),
        "tail_logprobs": build_list_column(
            _join([record.tail_logprobs for record in kept], np.float16), offsets, halfs
        ),
        "draw_ids": build_list_column(
            _join([each.ids.reshape(-1) for each in draws], np.int32), offsets * num_draws, ints
        ),
        "draw_counts": build_list_column(
            _join([each.counts.reshape(-1) for each in draws], np.uint8),
            offsets * num_draws,
            codes,
        ),
        "next_logprobs": build_list_column(next_logprobs.astype(np.float16), offsets, halfs),
        "nats": pa.array(
            _sum_nats(has_eos, next_logprobs, offsets, is_good),
            type=pa.float32(),
        ),
    }
    return pa.Table.from_pydict(columns, schema=CAPTURED), rejects


def _find_fault(record: TopLogprobs | Failure) -> str | None:
    if isinstance(record, Failure):
        return record.reason
    return None if record.is_finite() else NOT_FINITE


def _sum_nats(
    has_eos: np.ndarray,
    next_logprobs: np.ndarray,
    offsets: Int[np.ndarray, " rows_plus_1"],
    is_good: list[bool],
) -> np.ndarray:
    """Sum -next_logprobs over each row's text: EOS, said by the last but one, is left out."""
    totals = np.concatenate([[0.0], np.cumsum(next_logprobs, dtype=np.float64)])
    ends = offsets[1:] - np.where(has_eos, 2, 0)
    nats = totals[offsets[:-1]] - totals[np.maximum(ends, offsets[:-1])]
    return np.where(is_good, nats, np.inf).astype(np.float32)


def _join(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=dtype), *parts]).astype(dtype)
