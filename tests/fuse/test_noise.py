"""A source that knows nothing is told from its sums, and not heard in training."""

import math

import pytest

from rayfuse.fuse.noise import is_noise
from rayfuse.recipe import FuseSettings
from rayfuse.storage.dataset import Commit
from tests.train.data import open_reader, write_data

CHANCE = 100 * math.log(300)


def commit(**stats: float) -> Commit:
    return Commit(0, "", 0, "", 1, 1, 0, "", stats)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [([1.05], True), ([0.9], False), ([1.2, 0.7], False), ([1.2, 0.9], True), ([], False)],
)
def test_the_whole_corpus_decides(shares, expected):
    commits = [commit(nats=share * CHANCE, chance_nats=CHANCE) for share in shares]
    assert is_noise(commits) == expected


def test_who_has_not_counted_is_taken_for_better():
    silent = commit(positions=10.0)
    assert not is_noise([silent])
    assert not is_noise([silent, commit(nats=2.0, chance_nats=1.0)])


@pytest.mark.parametrize("skips", [True, False])
def test_it_is_not_heard_in_training_unless_it_is_asked_for(skips, tmp_path):
    stats = {
        "a": {"nats": 1.1 * CHANCE, "chance_nats": CHANCE},
        "b": {"nats": 0.5 * CHANCE, "chance_nats": CHANCE},
    }
    corpus, aligned = write_data(tmp_path, [[5, 7]], stats=stats)
    reader = open_reader(corpus, aligned, FuseSettings(skip_noise=skips))
    assert reader.names == (("b",) if skips else ("a", "b"))
    assert len(reader.weights) == len(reader.commits) - 1 == len(reader.names)
