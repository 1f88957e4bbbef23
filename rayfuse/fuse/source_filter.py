"""Sources without signal: random weights, or weights with another model's tokenizer."""

from collections.abc import Collection, Mapping

from rayfuse.config.fuse import FuseSettings
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.manifest import Commit

NOISE_SHARE = 0.001
"""Share of its tokens that a noise source may have, by luck, in rows 10 % better than chance."""


def is_noise(commits: Collection[Commit]) -> bool:
    """Check that (nearly) no row of a source has an NLL 10 % below chance (align/shard.py).

    Chance gives each token of the vocabulary the same probability. Rows decide, not the mean over
    the corpus: a source trained on a single domain may be worse than chance over all domains.

    Args:
        commits: Of all its aligned shards. A source with a shard that lacks these sums is kept.
    """
    stats_of_shards = [commit.stats for commit in commits if commit.rows]
    if not all("known_tokens" in stats for stats in stats_of_shards):
        return False
    scored = sum(stats["scored_tokens"] for stats in stats_of_shards)
    known = sum(stats["known_tokens"] for stats in stats_of_shards)
    return scored > 0 and known <= NOISE_SHARE * scored


def select_active_sources(
    aligned: Mapping[str, DataSet], fuse: FuseSettings
) -> tuple[dict[str, dict[int, Commit]], tuple[str, ...]]:
    """Select the sources that fusion uses, and name those that are skipped as noise.

    Args:
        aligned: The aligned data set of each source, by the source's name.
        fuse: A source of weight 0 is not active; nor is noise, with `skip_noise`.

    Returns:
        The commits of each active source by its name, and the names of the noise sources.
    """
    commits_of = {
        name: data.commits() for name, data in aligned.items() if fuse.weights.get(name, 1.0) > 0
    }
    noise = tuple(
        name
        for name, commits in commits_of.items()
        if fuse.skip_noise and is_noise(commits.values())
    )
    return {name: commits for name, commits in commits_of.items() if name not in noise}, noise
