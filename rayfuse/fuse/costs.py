"""What sources are compared by: their cross-entropy over a row, a document, a span or a token."""

import numpy as np
from jaxtyping import Bool, Float, Int

from rayfuse.config.fuse import FuseSettings


def cost_of_rows(
    nats: Float[np.ndarray, " rows"], sizes: Int[np.ndarray, " rows"]
) -> Float[np.ndarray, " rows"]:
    """Return a source's cost of each row.

    Args:
        nats: Its cross-entropy summed over each row; infinite where it was rejected.
        sizes: What the sums are divided by: the rows' bytes or the source's own tokens.
    """
    return np.divide(nats, sizes, out=np.full(len(nats), np.inf), where=sizes > 0)


def cost_of_documents(
    nats: Float[np.ndarray, " rows"],
    sizes: Int[np.ndarray, " rows"],
    documents: Int[np.ndarray, " rows"],
    is_common: Bool[np.ndarray, " rows"],
) -> Float[np.ndarray, " rows"]:
    """Return a source's cost of the document that each row belongs to; infinite if rejected.

    Only rows that every source has are summed up, so that all are compared over the same bytes. A
    document without such a row is compared row by row.

    Args:
        nats: As for `cost_of_rows`.
        sizes: Likewise.
        documents: The number of each row's document.
        is_common: Every source that is compared has the row.
    """
    shares = [np.where(is_common, each, 0.0) for each in (nats, sizes, np.ones(len(nats)))]
    total_nats, total_size, num_common = (
        np.bincount(documents, weights=each)[documents] for each in shares
    )
    whole = np.divide(total_nats, total_size, out=np.full(len(nats), np.inf), where=total_size > 0)
    costs = np.where(num_common > 0, whole, cost_of_rows(nats, sizes))
    return np.where(np.isfinite(nats), costs, np.inf)


def cost_of_positions(
    nats_per_byte: Float[np.ndarray, " tokens"] | None,
    num_bytes: Int[np.ndarray, " tokens"],
    row_costs: Float[np.ndarray, " rows"],
    offsets: Int[np.ndarray, " rows_plus_1"],
    settings: FuseSettings,
) -> Float[np.ndarray, " tokens"]:
    """Return a source's cost at each position of some rows, over the unit of the choice.

    Args:
        nats_per_byte: The source's cost of each position's next token; not needed for the units
            row and document.
        num_bytes: Bytes of that token; 0 at a row's end.
        row_costs: The cost of each whole row or document; infinite if the source was rejected.
        offsets: Where rows begin, and where the last one ends.
        settings: The unit, and the width of a span.
    """
    lengths = np.diff(offsets)
    whole = np.repeat(row_costs, lengths)
    if settings.unit in ("row", "document") or nats_per_byte is None:
        return whole
    reach = 0 if settings.unit == "token" else settings.span_tokens // 2
    at = np.arange(len(num_bytes))
    starts = np.maximum(at - reach, np.repeat(offsets[:-1], lengths))
    stops = np.minimum(at + reach + 1, np.repeat(offsets[1:], lengths))
    # A rejected row may say anything here, and must not spoil the sums of those behind it.
    spent_here = np.where(np.isfinite(whole), nats_per_byte.astype(np.float64) * num_bytes, 0.0)
    nats = np.concatenate([[0.0], np.cumsum(spent_here)])
    total = np.concatenate([[0], np.cumsum(num_bytes)])
    spent, spelled = nats[stops] - nats[starts], total[stops] - total[starts]
    costs = np.divide(spent, spelled, out=np.zeros(len(spent)), where=spelled > 0)
    return np.where(np.isfinite(whole), costs, np.inf)
