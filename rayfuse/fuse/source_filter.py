"""Sources that know nothing: random weights, or another model's tokenizer."""

from collections.abc import Collection, Mapping

from rayfuse.config.fuse import FuseSettings
from rayfuse.storage.dataset import Commit, DataSet

NOISE_SHARE = 0.001
"""Of the tokens: so few may be in rows that are predicted better than chance by luck."""


def is_noise(commits: Collection[Commit]) -> bool:
    """Return whether a source predicts no row of the corpus better than chance, or hardly any.

    Chance gives each token of its vocabulary the same probability. The mean over the corpus would
    not do: a source that knows one domain alone may be worse than chance on the whole.

    Args:
        commits: Of all its aligned shards. Where one does not tell, it is no noise.
    """
    told = [commit.stats for commit in commits if commit.rows]
    if not all("known_tokens" in stats for stats in told):
        return False
    scored = sum(stats["scored_tokens"] for stats in told)
    return scored > 0 and sum(stats["known_tokens"] for stats in told) <= NOISE_SHARE * scored


def select_active_sources(
    aligned: Mapping[str, DataSet], fuse: FuseSettings
) -> tuple[dict[str, dict[int, Commit]], tuple[str, ...]]:
    """Return the commits of the sources that are heard, and the names of those that are noise."""
    commits = {
        name: data.commits() for name, data in aligned.items() if fuse.weights.get(name, 1.0) > 0
    }
    noise = [name for name, each in commits.items() if fuse.skip_noise and is_noise(each.values())]
    return {name: each for name, each in commits.items() if name not in noise}, tuple(noise)
