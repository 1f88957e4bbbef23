"""The posterior over sources from the text so far: a Bayesian mixture that may switch.

Fixed share (Herbster and Warmuth, 1998, "Tracking the best expert"): a weight is multiplied by the
probability that its source gave to the last text; then a share `a` of all weights is redistributed
to the prior:

    v_s = w_s * p_s(text);   w_s <- (1 - a) * v_s / sum(v) + a * prior_s

A weight depends only on text before its position, so the mixture is a distribution of the next
token. NLL is stored by byte, spread over each token of the source; weights change only where a
token of every source has ended, so no part of a token's NLL is used before its end.
"""

from collections.abc import Sequence
from typing import no_type_check

import numba
import numpy as np
from jaxtyping import Bool, Float, Int


def weigh_by_posterior(
    nats: Float[np.ndarray, "num_sources tokens"],
    starts_token: Bool[np.ndarray, "num_sources tokens"],
    has_row: Bool[np.ndarray, "num_sources rows"],
    offsets: Int[np.ndarray, " rows_plus_1"],
    documents: Int[np.ndarray, " rows"],
    *,
    prior: Sequence[float],
    switch_rate: float,
) -> Float[np.ndarray, "num_sources tokens"]:
    """Compute each source's weight at each position of a shard; weights sum to 1.

    Args:
        nats: Each source's NLL of the token that comes next; 0 at a row's end. It is not read in
            rows that the source rejected.
        starts_token: A token of the source starts where the next token does.
        has_row: The source did not reject the row. The weight of one that did only moves towards
            the prior.
        offsets: Where rows begin, and where the last one ends.
        documents: The number of each row's document. A document's rows continue one another; at the
            start of a document the weights are the prior.
        prior: Weights before any text, above 0; they are scaled to sum to 1.
        switch_rate: `a`, per token of the target.
    """
    weights = np.empty(nats.shape, dtype=np.float32)
    scaled = np.array(prior, dtype=np.float64) / np.sum(prior)
    _filter(nats, starts_token, has_row, offsets, documents, scaled, switch_rate, weights)
    return weights


@numba.njit(cache=True)
@no_type_check
def _filter(  # noqa: PLR0917 (compiled)
    nats, starts_token, has_row, offsets, documents, prior, switch_rate, weights
):
    num_sources = len(nats)
    current, pending = prior.copy(), np.zeros(num_sources)
    for row in range(len(offsets) - 1):
        if row == 0 or documents[row] != documents[row - 1]:
            current[:] = prior
        pending[:] = 0.0
        tokens = 0
        for at in range(offsets[row], offsets[row + 1]):
            is_common = True
            for source in range(num_sources):
                if has_row[source, row] and not starts_token[source, at]:
                    is_common = False
            if is_common and tokens:
                _update(current, pending, has_row, row, prior, switch_rate, tokens)
                tokens = 0
            for source in range(num_sources):
                weights[source, at] = current[source]
                if has_row[source, row]:
                    pending[source] += nats[source, at]
            tokens += 1
        if tokens:  # the end of a row ends a token of every source
            _update(current, pending, has_row, row, prior, switch_rate, tokens)


@numba.njit(cache=True)
@no_type_check
def _update(current, pending, has_row, row, prior, switch_rate, tokens):  # noqa: PLR0917 (compiled)
    """Multiply the weights by exp(-NLL), redistribute a share of them, and set the NLL to 0."""
    lowest, before, after = np.inf, 0.0, 0.0
    for source in range(len(current)):
        if has_row[source, row]:
            lowest = min(lowest, pending[source])
            before += current[source]
    if not np.isfinite(lowest):
        return
    for source in range(len(current)):
        if has_row[source, row]:
            current[source] *= np.exp(lowest - pending[source])
            after += current[source]
    kept = (1.0 - switch_rate) ** tokens
    for source in range(len(current)):
        if has_row[source, row]:
            current[source] *= before / after
        current[source] = kept * current[source] + (1.0 - kept) * prior[source]
        pending[source] = 0.0
