"""The unigram distribution of a corpus, by which `tail: unigram` divides the mass of a tail."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from rayfuse.storage.codec import flatten_column
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.manifest import Commit

COUNTED_TOKENS = 2**22
"""Tokens after which counting stops: the shares of all but rare tokens are known by then."""

MIN_REST = 1e-6
"""Lower bound of the share of all tokens without an entry, which a tail is divided by."""

SMOOTHING = 0.5
"""Added to the count of every token, so that none is impossible."""


def count_unigram(
    corpus: DataSet, commits: Mapping[int, Commit], vocab_size: int
) -> Float[np.ndarray, " vocab"]:
    """Count the target's tokens in the first shards of a corpus, and return their shares.

    The result depends on the corpus alone, so that all workers and attempts have the same.

    Raises:
        ShardError: A shard is missing or corrupt.
    """
    counts = np.full(vocab_size, SMOOTHING)
    for shard in sorted(commits):
        table = corpus.read_shard(commits[shard], ["target_ids"])
        ids, offsets = flatten_column(table, "target_ids")
        is_predicted = np.ones(len(ids), dtype=bool)
        is_predicted[offsets[:-1][np.diff(offsets) > 0]] = False  # a row's first token is given
        counts += np.bincount(ids[is_predicted], minlength=vocab_size)
        if counts.sum() >= COUNTED_TOKENS:
            break
    return (counts / counts.sum()).astype(np.float32)
