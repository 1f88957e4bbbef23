"""Sources that know nothing: random weights, or another model's tokenizer."""

from collections.abc import Iterable

from rayfuse.storage.dataset import Commit


def is_noise(commits: Iterable[Commit]) -> bool:
    """Return whether a source predicts the whole corpus no better than chance.

    Chance gives each token of its vocabulary the same probability: ln V nats a token, which any
    training, if only of token frequencies, goes below.

    Args:
        commits: Of its aligned shards. Those that do not tell are taken for better than chance.
    """
    nats = chance = 0.0
    for commit in commits:
        nats += commit.stats.get("nats", 0.0)
        chance += commit.stats.get("chance_nats", 0.0)
    return nats >= chance > 0
