"""What sources are compared by: their cross-entropy over a row, a document, a span or a token."""

import numpy as np
from jaxtyping import Bool, Float, Int

from rayfuse.recipe import FuseSettings


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
    nats_per_byte: Float[np.ndarray, " seq_len"],
    num_bytes: Int[np.ndarray, " seq_len"],
    row_cost: float,
    settings: FuseSettings,
) -> Float[np.ndarray, " seq_len"]:
    """Return a source's cost at each position of a row, over the unit that the choice is made for.

    Args:
        nats_per_byte: The source's cost of each position's next token.
        num_bytes: Bytes of that token.
        row_cost: The cost of the whole row or document; infinite if the source was rejected.
        settings: The unit, and the width of a span.
    """
    if settings.unit in ("row", "document") or not np.isfinite(row_cost):
        return np.full(len(nats_per_byte), row_cost)
    reach = 0 if settings.unit == "token" else settings.span_tokens // 2
    at = np.arange(len(num_bytes))
    starts, stops = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(num_bytes))
    nats = np.concatenate([[0.0], np.cumsum(nats_per_byte.astype(np.float64) * num_bytes)])
    total = np.concatenate([[0], np.cumsum(num_bytes)])
    spent, spelled = nats[stops] - nats[starts], total[stops] - total[starts]
    return np.divide(spent, spelled, out=np.zeros(len(spent)), where=spelled > 0)
