"""Conversations -> CAPTURED rows: each in the source's own chat template."""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from rayfuse.capture.engines.base import Failure, TokenRows
from rayfuse.capture.rows import build_captured
from rayfuse.capture.top_k import TopLogprobs
from rayfuse.models.chat import ChatError, ChatTokens
from rayfuse.storage.chat_columns import append_answers
from rayfuse.storage.rejects import Reject

Results = Sequence[TopLogprobs | Failure]


def score_conversations(
    encoded: Sequence[ChatTokens | ChatError], score: Callable[[TokenRows], Results]
) -> list[TopLogprobs | Failure]:
    """Score the conversations that could be encoded; the others fail with their reason.

    Args:
        encoded: Each conversation in the source's tokens.
        score: Scores rows of token ids, and returns one result per row.
    """
    results = iter(score([row.ids for row in encoded if isinstance(row, ChatTokens)]))
    return [
        next(results) if isinstance(row, ChatTokens) else Failure(f"unusable messages: {row}")
        for row in encoded
    ]


def build_chat_captured(
    corpus: pa.Table, encoded: Sequence[ChatTokens | ChatError], results: Results
) -> tuple[pa.Table, list[Reject]]:
    """Build the CAPTURED rows of conversations, with the column `answers`.

    Args:
        corpus: The CORPUS rows.
        encoded: Each conversation in the source's tokens.
        results: What `score_conversations` returned.
    """
    tokens = [row if isinstance(row, ChatTokens) else None for row in encoded]
    ids = [np.zeros(0, dtype=np.int32) if row is None else row.ids for row in tokens]
    table, rejects = build_captured(corpus, ids, results, eos_id=None)
    rejected = {reject.name for reject in rejects}
    kept = [
        None if row_id in rejected else row
        for row_id, row in zip(table["row_id"].to_pylist(), tokens, strict=True)
    ]
    nats = [
        np.inf if row is None or isinstance(result, Failure) else _sum_answers(row, result)
        for row, result in zip(kept, results, strict=True)
    ]
    at = table.schema.get_field_index("nats")
    table = table.set_column(at, table.schema.field(at), pa.array(nats, type=pa.float32()))
    return append_answers(table, kept), rejects


def _sum_answers(row: ChatTokens, result: TopLogprobs) -> float:
    """Sum -next_logprobs over the tokens of all answers, without the ends of turns."""
    logprobs: Float[np.ndarray, " tokens"] = result.next_logprobs.astype(np.float64)
    return -float(sum(logprobs[start - 1 : stop - 1].sum() for start, stop, _ in row.answers))
