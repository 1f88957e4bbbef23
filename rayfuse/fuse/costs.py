"""What sources are compared by: their cross-entropy over a row, a document, a span or a token."""

import numpy as np
from jaxtyping import Float, Int

from rayfuse.recipe import FuseSettings


def cost_of_rows(
    nats: Float[np.ndarray, " rows"],
    sizes: Int[np.ndarray, " rows"],
    documents: Int[np.ndarray, " rows"] | None = None,
) -> Float[np.ndarray, " rows"]:
    """Return a source's cost of each row, or of the document that each row belongs to.

    Args:
        nats: Its cross-entropy summed over each row; infinite where it was rejected.
        sizes: What the sums are divided by: the rows' bytes or the source's own tokens.
        documents: The number of each row's document, if documents are what is compared. A rejected
            row tells nothing of its document, so it is left out of its sums.
    """
    if documents is not None:
        is_known = np.isfinite(nats)
        sizes = np.bincount(documents, weights=sizes * is_known)[documents]
        known = np.bincount(documents, weights=np.where(is_known, nats, 0.0))[documents]
        nats = np.where(is_known, known, np.inf)
    return np.divide(nats, sizes, out=np.full(len(nats), np.inf), where=sizes > 0)


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
    width = 1 if settings.unit == "token" else settings.span_tokens
    starts = np.maximum(np.arange(len(num_bytes)) - (width - 1) // 2, 0)
    stops = np.minimum(starts + width, len(num_bytes))
    nats = np.concatenate([[0.0], np.cumsum(nats_per_byte.astype(np.float64) * num_bytes)])
    total = np.concatenate([[0], np.cumsum(num_bytes)])
    spent, spelled = nats[stops] - nats[starts], total[stops] - total[starts]
    return np.divide(spent, spelled, out=np.zeros(len(spent)), where=spelled > 0)
