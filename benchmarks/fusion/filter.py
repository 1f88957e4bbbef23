"""The ensemble that weighs its models by how well each predicted the text before."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from rayfuse.evaluate.ensemble import TokenNLL, find_joint_ends, sum_chunks
from rayfuse.fuse.posterior import weigh_by_posterior


def filter_sources(
    token_nll: Sequence[Sequence[TokenNLL]], doc_ids: Sequence[str], switch_rate: float
) -> Float[np.ndarray, " rows"]:
    """Compute the NLL of each row under the mixture of `fuse.method: fixed_share`, in nats.

    The mixture is over chunks, as for `average_sources`. Weights are carried over the rows of a
    document, and start equal.

    Args:
        token_nll: The rows under each model.
        doc_ids: The document of each row.
        switch_rate: Share of the weights that returns to the prior with each chunk.
    """
    ends = [find_joint_ends(row) for row in zip(*token_nll, strict=True)]
    nats = np.stack(
        [
            np.concatenate([sum_chunks(*row) for row in zip(rows, ends, strict=True)])
            for rows in token_nll
        ]
    )
    offsets = np.concatenate([[0], np.cumsum([len(chunks) for chunks in ends])]).astype(np.int64)
    numbers = np.unique(doc_ids, return_inverse=True)[1]
    weights = weigh_by_posterior(
        nats,
        np.ones(nats.shape, dtype=bool),
        np.ones((len(token_nll), len(ends)), dtype=bool),
        offsets,
        numbers,
        prior=np.ones(len(token_nll)).tolist(),
        switch_rate=switch_rate,
    )
    mixed = -np.logaddexp.reduce(np.log(weights) - nats, axis=0)
    return np.add.reduceat(np.append(mixed, 0.0), offsets[:-1]) * (np.diff(offsets) > 0)
