"""The posterior over sources: plain loops give the same, and later text never changes a weight."""

import numpy as np
import pytest

from rayfuse.config.fuse import FuseSettings
from rayfuse.fuse.posterior import weigh_by_posterior
from rayfuse.fuse.unigram import SMOOTHING
from tests.train.data import VOCAB, open_reader, write_data

SOURCES, ROWS, ROW_TOKENS = 3, 6, 20


def draw(seed: int) -> dict:
    random = np.random.default_rng(seed)
    offsets = np.arange(ROWS + 1) * ROW_TOKENS
    starts_token = random.random((SOURCES, offsets[-1])) < 0.8
    starts_token[:, offsets[:-1]] = True
    nats = random.exponential(2.0, (SOURCES, offsets[-1]))
    nats[:, offsets[1:] - 1] = 0.0
    has_row = np.ones((SOURCES, ROWS), dtype=bool)
    has_row[1, 2], has_row[:, 4] = False, False
    nats[~np.repeat(has_row, ROW_TOKENS, axis=1)] = 0.0
    documents = np.array([0, 0, 0, 1, 1, 2])
    places = {"starts_token": starts_token, "has_row": has_row, "offsets": offsets}
    return {"nats": nats, **places, "documents": documents}


def weigh_plainly(case: dict, prior: list[float], switch_rate: float) -> np.ndarray:
    """Row by row and token by token, in Python."""
    weights = np.zeros(case["nats"].shape)
    base = np.array(prior) / sum(prior)
    document, current = -1, base
    for row in range(ROWS):
        if case["documents"][row] != document:
            document, current = case["documents"][row], base
        active = case["has_row"][:, row]
        start, stop = case["offsets"][row : row + 2]
        since = start
        for at in range(start, stop + 1):
            ends = at == stop or case["starts_token"][active, at].all()
            if ends and at > since:
                if active.any():
                    likelihood = np.exp(-case["nats"][:, since:at].sum(axis=1))
                    likelihood /= (likelihood * current)[active].sum() / current[active].sum()
                    moved = np.where(active, current * likelihood, current)
                    kept = (1 - switch_rate) ** (at - since)
                    current = kept * moved + (1 - kept) * base
                since = at
            if at < stop:
                weights[:, at] = current
    return weights


@pytest.mark.parametrize("switch_rate", [0.001, 0.05, 0.5])
def test_weights_are_those_of_plain_loops(switch_rate):
    for seed in range(20):
        case = draw(seed)
        found = weigh_by_posterior(**case, prior=[1.0, 2.0, 0.5], switch_rate=switch_rate)
        expected = weigh_plainly(case, [1.0, 2.0, 0.5], switch_rate)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        np.testing.assert_allclose(found.sum(axis=0), 1, rtol=1e-6)


def test_later_text_never_changes_earlier_weights():
    """Nor do the bytes of a token that has not ended for every source."""
    case = draw(0)
    before = weigh_by_posterior(**case, prior=[1.0] * SOURCES, switch_rate=0.05)
    random = np.random.default_rng(1)
    is_rejected = ~np.repeat(case["has_row"], ROW_TOKENS, axis=1)
    is_common = (case["starts_token"] | is_rejected).all(axis=0)
    for at in range(1, case["offsets"][-1]):
        common = np.flatnonzero(is_common[: at + 1])
        changed = case | {"nats": case["nats"].copy()}
        changed["nats"][:, common[-1] :] = random.exponential(9.0, (SOURCES, 1))
        after = weigh_by_posterior(**changed, prior=[1.0] * SOURCES, switch_rate=0.05)
        np.testing.assert_array_equal(after[:, : at + 1], before[:, : at + 1])


def test_the_source_that_predicts_a_document_gets_its_weight_and_the_next_starts_anew():
    case = draw(0)
    case["nats"][:] = 3.0
    case["nats"][2] = 0.1
    case["has_row"][:] = True
    found = weigh_by_posterior(**case, prior=[1.0] * SOURCES, switch_rate=0.02)
    starts = case["offsets"][:-1]
    assert (found[2, starts[1:3]] > 0.9).all()  # carried over the rows of a document
    np.testing.assert_allclose(found[:, starts[[0, 3, 5]]], 1 / SOURCES, rtol=1e-6)


def test_a_reader_weighs_by_the_text_before_and_counts_the_corpus(tmp_path):
    corpus, aligned = write_data(tmp_path, [[15, 17], [9, 30]])
    reader = open_reader(corpus, aligned, FuseSettings(method="fixed_share", tail="unigram"))
    reader.keep({0, 1})
    rows = reader.read_rows(np.array([[0, 0], [0, 1], [1, 1]]))
    mass = rows.top.probs.sum(axis=1) + rows.top.tail
    np.testing.assert_allclose(mass, rows.has_signal.astype(float), atol=1e-3)
    assert rows.has_signal.sum() > 20
    shards = [corpus.read_shard(corpus.read_commit(shard)) for shard in (0, 1)]
    rows = [row for table in shards for row in table["target_ids"].to_pylist()]
    ids = np.array([token for row in rows for token in row[1:]])  # the first is given
    expected = (np.bincount(ids, minlength=VOCAB) + SMOOTHING) / (len(ids) + SMOOTHING * VOCAB)
    np.testing.assert_allclose(reader.unigram, expected, rtol=1e-6)
    opened = reader.open[0].result()
    weights = np.exp(-np.stack([source.nll for source in opened.sources]))
    is_active = np.isfinite([source.nll for source in opened.sources]).all(axis=0)
    np.testing.assert_allclose(weights.sum(axis=0)[is_active], 1, rtol=1e-6)
    np.testing.assert_allclose(weights[:, 0][weights[:, 0] > 0], 0.5, rtol=1e-6)  # the prior
