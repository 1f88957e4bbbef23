"""A source that knows nothing is told from its sums, and not heard in training."""

import pytest

from rayfuse.config.fuse import FuseSettings
from rayfuse.fuse.source_filter import is_noise
from rayfuse.storage.dataset import Commit
from tests.train.data import open_reader, write_data


def commit(**stats: float) -> Commit:
    return Commit(0, "", 0, "", 1, 1, 0, "", stats)


@pytest.mark.parametrize(
    ("known", "expected"), [([0, 0], True), ([0, 1], True), ([0, 30], False), ([1000, 1000], False)]
)
def test_a_source_that_knows_one_domain_alone_is_no_noise(known, expected):
    commits = [commit(known_tokens=each, scored_tokens=1000.0) for each in map(float, known)]
    assert is_noise(commits) == expected


def test_who_has_not_counted_is_taken_for_better():
    silent = commit(positions=10.0)
    assert not is_noise([silent])
    assert not is_noise([silent, commit(known_tokens=0.0, scored_tokens=9.0)])


@pytest.mark.parametrize("skips", [True, False])
def test_it_is_not_heard_in_training_unless_it_is_asked_for(skips, tmp_path):
    stats = {
        "a": {"known_tokens": 0.0, "scored_tokens": 1000.0},
        "b": {"known_tokens": 900.0, "scored_tokens": 1000.0},
    }
    corpus, aligned = write_data(tmp_path, [[5, 7]], stats=stats)
    reader = open_reader(corpus, aligned, FuseSettings(skip_noise=skips))
    assert reader.names == (("b",) if skips else ("a", "b"))
    assert len(reader.weights) == len(reader.commits) - 1 == len(reader.names)
