"""Records -> CAPTURED rows: one row per corpus row, in the same order, without padding."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from rayfuse.capture.engines.base import Failure
from rayfuse.capture.sampling import count_draws
from rayfuse.capture.top_k import TopLogprobs
from rayfuse.models.tokenizer import TextTokenizer
from rayfuse.schema import CAPTURED, codes, halfs, ints
from rayfuse.storage.codec import EncodedTopK, build_list_column, encode_probs
from rayfuse.storage.rejects import Reject

NOT_FINITE = "log-probabilities are not finite"


def tokenize_rows(corpus: pa.Table, tokenizer: TextTokenizer) -> list[Int[np.ndarray, " _"]]:
    """Tokenize each corpus row for the source, start token and EOS included."""
    return tokenizer.encode_rows(corpus["text"].to_pylist(), corpus["ends_document"].to_pylist())


def build_captured(
    corpus: pa.Table,
    token_rows: Sequence[Int[np.ndarray, " _"]],
    results: Sequence[TopLogprobs | Failure],
    eos_id: int | None,
) -> tuple[pa.Table, list[Reject]]:
    """Build the CAPTURED rows, those of failed rows empty, and list the failed rows.

    Args:
        corpus: The CORPUS rows.
        token_rows: Their tokens.
        results: What the engine returned for them.
        eos_id: The source's EOS, which ends rows that end documents.

    Raises:
        ValueError: Records have different numbers of entries or draws per position.
    """
    row_ids: list[str] = corpus["row_id"].to_pylist()
    reasons = [_find_fault(result) for result in results]
    rejects = [
        Reject(row_id, reason)
        for row_id, reason in zip(row_ids, reasons, strict=True)
        if reason is not None
    ]
    is_good = np.array([reason is None for reason in reasons], dtype=bool)
    records = [
        result
        for result, good in zip(results, is_good, strict=True)
        if good and isinstance(result, TopLogprobs)
    ]
    tokens = [row for row, good in zip(token_rows, is_good, strict=True) if good]
    lengths = [len(row) if good else 0 for row, good in zip(token_rows, is_good, strict=True)]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    next_logprobs = _join([record.next_logprobs for record in records], np.float32)
    # From the corpus, not from the tokens: a literal `</s>` that ends a text may have the same id.
    has_eos = np.array(corpus["ends_document"].to_pylist(), dtype=bool) & (eos_id is not None)
    nats = np.where(is_good, _sum_nats(has_eos, next_logprobs, offsets), np.inf)
    columns = {
        "row_id": pa.array(row_ids, type=pa.string()),
        "token_ids": build_list_column(_join(tokens, np.int32), offsets, ints),
        **_build_top_columns(records, offsets),
        **_build_draw_columns(records, offsets),
        "next_logprobs": build_list_column(next_logprobs.astype(np.float16), offsets, halfs),
        "nats": pa.array(nats.astype(np.float32), type=pa.float32()),
    }
    return pa.Table.from_pydict(columns, schema=CAPTURED), rejects


def _find_fault(result: TopLogprobs | Failure) -> str | None:
    if isinstance(result, Failure):
        return result.reason
    return None if result.is_finite() else NOT_FINITE


def _build_top_columns(
    records: Sequence[TopLogprobs], offsets: Int[np.ndarray, " rows_plus_1"]
) -> dict[str, pa.ListArray]:
    encoded = [_encode_record(record) for record in records]
    entries = offsets * _find_width([top.ids for top in encoded])
    ids = _join([top.ids.reshape(-1) for top in encoded], np.int32)
    levels = _join([top.codes.reshape(-1) for top in encoded], np.uint8)
    tails = _join([top.tail_logprobs for top in encoded], np.float16)
    return {
        "top_ids": build_list_column(ids, entries, ints),
        "top_logprobs": build_list_column(levels, entries, codes),
        "tail_logprobs": build_list_column(tails, offsets, halfs),
    }


def _encode_record(record: TopLogprobs) -> EncodedTopK:
    """Encode a row's top k as stored, one byte a probability."""
    encoded = encode_probs(np.exp(record.top_logprobs)).reshape(record.top_ids.shape)
    return EncodedTopK(record.top_ids, encoded, record.tail_logprobs.astype(np.float16))


def _build_draw_columns(
    records: Sequence[TopLogprobs], offsets: Int[np.ndarray, " rows_plus_1"]
) -> dict[str, pa.ListArray]:
    draws = [count_draws(record.drawn_ids) for record in records]
    entries = offsets * _find_width([ids for ids, _ in draws])
    ids = _join([ids.reshape(-1) for ids, _ in draws], np.int32)
    counts = _join([counts.reshape(-1) for _, counts in draws], np.uint8)
    return {
        "draw_ids": build_list_column(ids, entries, ints),
        "draw_counts": build_list_column(counts, entries, codes),
    }


def _find_width(parts: Sequence[Int[np.ndarray, "_ _"]]) -> int:
    """Find the number of columns of all parts; 0 without any.

    Raises:
        ValueError: They differ. Readers divide a flat column by positions, so that entries of
            one position would be read as those of another.
    """
    widths = {part.shape[1] for part in parts}
    if len(widths) > 1:
        raise ValueError(f"records have different numbers of entries: {sorted(widths)}")
    return widths.pop() if widths else 0


def _sum_nats(
    has_eos: Bool[np.ndarray, " rows"],
    next_logprobs: Float[np.ndarray, " positions"],
    offsets: Int[np.ndarray, " rows_plus_1"],
) -> Float[np.ndarray, " rows"]:
    """Sum -next_logprobs over each row's text.

    The last position predicts nothing. Where a row has an EOS, the position before it predicts that
    and not text, so it is excluded.
    """
    totals = np.concatenate([[0.0], np.cumsum(next_logprobs, dtype=np.float64)])
    ends = offsets[1:] - np.where(has_eos, 2, 0)
    return totals[offsets[:-1]] - totals[np.maximum(ends, offsets[:-1])]


def _join(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """Concatenate arrays of which there may be none."""
    return np.concatenate([np.zeros(0, dtype=dtype), *parts]).astype(dtype)
