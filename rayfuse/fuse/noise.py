"""Sources that know nothing: random weights, or another model's tokenizer."""

from collections.abc import Collection, Mapping

from rayfuse.recipe import FuseSettings
from rayfuse.storage.dataset import Commit, DataSet

CHANCE_SHARE = 0.98
"""Of what chance pays: random weights may be a little below it by luck with frequent tokens, where
knowing no more than how frequent tokens are comes to about 0.7."""


def is_noise(commits: Collection[Commit]) -> bool:
    """Return whether a source predicts the whole corpus no better than chance.

    Chance gives each token of its vocabulary the same probability: ln V nats a token.

    Args:
        commits: Of all its aligned shards. Where one does not tell, it is no noise.
    """
    told = [commit.stats for commit in commits if commit.rows]
    if not all("chance_nats" in stats for stats in told):
        return False
    chance = sum(stats["chance_nats"] for stats in told)
    return sum(stats["nats"] for stats in told) >= CHANCE_SHARE * chance > 0


def read_heard(
    aligned: Mapping[str, DataSet], fuse: FuseSettings
) -> tuple[dict[str, dict[int, Commit]], tuple[str, ...]]:
    """Return the commits of the sources that are heard, and the names of those that are noise."""
    commits = {
        name: data.commits() for name, data in aligned.items() if fuse.weights.get(name, 1.0) > 0
    }
    noise = [name for name, each in commits.items() if fuse.skip_noise and is_noise(each.values())]
    return {name: each for name, each in commits.items() if name not in noise}, tuple(noise)
