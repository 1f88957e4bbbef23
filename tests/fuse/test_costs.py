import numpy as np
import pytest

from rayfuse.fuse.costs import cost_of_positions, cost_of_rows
from rayfuse.recipe import FuseSettings

NATS_PER_BYTE = np.array([1.0, 2.0, 0.5, 4.0, 0.0], dtype=np.float16)
NUM_BYTES = np.array([2, 1, 4, 1, 0])


def test_a_row_costs_its_nats_over_its_bytes_and_a_rejected_one_is_infinite():
    costs = cost_of_rows(np.array([4.0, np.inf, 3.0]), np.array([8, 5, 0]))
    assert costs.tolist() == [0.5, np.inf, np.inf]


def test_rows_of_one_document_share_its_cost():
    nats, num_bytes = np.array([2.0, 6.0, 5.0, np.inf]), np.array([4, 4, 10, 7])
    costs = cost_of_rows(nats, num_bytes, np.array([0, 0, 1, 1]))
    assert costs.tolist() == [1.0, 1.0, 0.5, np.inf]  # the rejected row is left out of its document


def test_the_unit_token_costs_what_the_next_token_does():
    costs = cost_of_positions(NATS_PER_BYTE, NUM_BYTES, 0.7, FuseSettings(unit="token"))
    np.testing.assert_allclose(costs, [1.0, 2.0, 0.5, 4.0, 0.0])


def test_the_unit_span_is_a_sliding_window_weighted_by_bytes():
    settings = FuseSettings(unit="span", span_tokens=3)
    costs = cost_of_positions(NATS_PER_BYTE, NUM_BYTES, 0.7, settings)
    nats = NATS_PER_BYTE.astype(float) * NUM_BYTES
    for t in range(5):
        window = slice(max(t - 1, 0), max(t - 1, 0) + 3)
        assert costs[t] == pytest.approx(nats[window].sum() / NUM_BYTES[window].sum())


@pytest.mark.parametrize("unit", ["row", "document"])
def test_a_choice_for_the_whole_row_has_one_cost(unit):
    costs = cost_of_positions(NATS_PER_BYTE, NUM_BYTES, 0.7, FuseSettings(unit=unit))
    assert set(costs) == {0.7}


@pytest.mark.parametrize("unit", ["row", "span", "token"])
def test_a_rejected_row_is_infinitely_dear_in_every_unit(unit):
    costs = cost_of_positions(NATS_PER_BYTE, NUM_BYTES, np.inf, FuseSettings(unit=unit))
    assert np.isinf(costs).all()
