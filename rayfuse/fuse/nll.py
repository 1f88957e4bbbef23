"""Negative log-likelihood (NLL) of each source over a row, a document, a span or a token.

Sources are compared by it, in nats per byte of text or per token of the source.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from rayfuse.config.fuse import FuseSettings


def nll_of_rows(
    nats: Float[np.ndarray, " rows"], sizes: Int[np.ndarray, " rows"]
) -> Float[np.ndarray, " rows"]:
    """Divide a source's NLL of each row by the row's size; infinite where the size is 0.

    Args:
        nats: The NLL summed over each row; infinite where the source rejected the row.
        sizes: The rows' bytes, or the source's own tokens of them.
    """
    return np.divide(nats, sizes, out=np.full(len(nats), np.inf), where=sizes > 0)


def nll_of_documents(
    nats: Float[np.ndarray, " rows"],
    sizes: Int[np.ndarray, " rows"],
    documents: Int[np.ndarray, " rows"],
    is_common: Bool[np.ndarray, " rows"],
) -> Float[np.ndarray, " rows"]:
    """Compute a source's NLL of the document that each row belongs to; infinite if rejected.

    Only rows that every source has are added up, so that all sources are compared over the same
    bytes. A document without such a row is compared row by row.

    Args:
        nats: As for `nll_of_rows`.
        sizes: As for `nll_of_rows`.
        documents: The number of each row's document.
        is_common: Every source that is compared has the row.
    """
    columns = (nats, sizes, np.ones(len(nats)))
    total_nats, total_size, num_common = (
        np.bincount(documents, weights=np.where(is_common, column, 0.0))[documents]
        for column in columns
    )
    of_document = np.divide(
        total_nats, total_size, out=np.full(len(nats), np.inf), where=total_size > 0
    )
    nll = np.where(num_common > 0, of_document, nll_of_rows(nats, sizes))
    return np.where(np.isfinite(nats), nll, np.inf)


def nll_of_positions(
    nats_per_byte: Float[np.ndarray, " tokens"] | None,
    num_bytes: Int[np.ndarray, " tokens"],
    row_nll: Float[np.ndarray, " rows"],
    offsets: Int[np.ndarray, " rows_plus_1"],
    settings: FuseSettings,
) -> Float[np.ndarray, " tokens"]:
    """Compute a source's NLL at each position of some rows, over the unit of the choice.

    Args:
        nats_per_byte: The source's NLL of each position's next token, per byte; not needed for the
            units row and document.
        num_bytes: Bytes of that token; 0 at a row's end.
        row_nll: The NLL of each row or document; infinite if the source rejected it.
        offsets: Where rows begin, and where the last one ends.
        settings: The unit, and the width of a span.
    """
    lengths = np.diff(offsets)
    nll_of_row = np.repeat(row_nll, lengths)
    if settings.unit in ("row", "document") or nats_per_byte is None:
        return nll_of_row
    reach = 0 if settings.unit == "token" else settings.span_tokens // 2
    at = np.arange(len(num_bytes))
    starts = np.maximum(at - reach, np.repeat(offsets[:-1], lengths))
    stops = np.minimum(at + reach + 1, np.repeat(offsets[1:], lengths))
    # A rejected row may hold any number here. The sums run over all rows, so an infinity or NaN
    # would reach the rows after it: count the rejected row as 0.
    nats = np.where(np.isfinite(nll_of_row), nats_per_byte.astype(np.float64) * num_bytes, 0.0)
    nats_before = np.concatenate([[0.0], np.cumsum(nats)])
    bytes_before = np.concatenate([[0], np.cumsum(num_bytes)])
    span_nats = nats_before[stops] - nats_before[starts]
    span_bytes = bytes_before[stops] - bytes_before[starts]
    nll = np.divide(span_nats, span_bytes, out=np.zeros(len(span_nats)), where=span_bytes > 0)
    return np.where(np.isfinite(nll_of_row), nll, np.inf)
