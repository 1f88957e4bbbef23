"""A noise source is found by its sums, and is not active in training."""

import pytest

from rayfuse.config.fuse import FuseSettings
from rayfuse.fuse.source_filter import is_noise
from rayfuse.storage.manifest import Commit
from tests.train.data import open_reader, write_data


def commit(**stats: float) -> Commit:
    return Commit(0, "", 0, "", 1, 1, 0, "", stats)


@pytest.mark.parametrize(
    ("known", "expected"), [([0, 0], True), ([0, 1], True), ([0, 30], False), ([1000, 1000], False)]
)
def test_a_source_trained_on_a_single_domain_is_not_noise(known, expected):
    commits = [commit(known_tokens=tokens, scored_tokens=1000.0) for tokens in map(float, known)]
    assert is_noise(commits) == expected


def test_a_source_without_noise_stats_is_kept():
    uncounted = commit(positions=10.0)
    assert not is_noise([uncounted])
    assert not is_noise([uncounted, commit(known_tokens=0.0, scored_tokens=9.0)])


@pytest.mark.parametrize("skips", [True, False])
def test_noise_is_not_active_in_training_unless_skip_noise_is_off(skips, tmp_path):
    stats = {
        "a": {"known_tokens": 0.0, "scored_tokens": 1000.0},
        "b": {"known_tokens": 900.0, "scored_tokens": 1000.0},
    }
    corpus, aligned = write_data(tmp_path, [[5, 7]], stats=stats)
    reader = open_reader(corpus, aligned, FuseSettings(skip_noise=skips))
    assert reader.names == (("b",) if skips else ("a", "b"))
    assert len(reader.opener.weights) == len(reader.opener.commits) - 1 == len(reader.names)
