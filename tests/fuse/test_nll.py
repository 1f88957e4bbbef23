import numpy as np
import pytest

from rayfuse.config.fuse import FuseSettings
from rayfuse.fuse.nll import nll_of_documents, nll_of_positions, nll_of_rows

NATS_PER_BYTE = np.array([1.0, 2.0, 0.5, 4.0, 0.0], dtype=np.float16)
NUM_BYTES = np.array([2, 1, 4, 1, 0])


def test_the_nll_of_a_row_is_its_nats_over_its_bytes_and_infinite_if_rejected():
    nll = nll_of_rows(np.array([4.0, np.inf, 3.0]), np.array([8, 5, 0]))
    assert nll.tolist() == [0.5, np.inf, np.inf]


def test_rows_of_one_document_share_its_nll():
    nats, num_bytes = np.array([2.0, 6.0, 5.0]), np.array([4, 4, 10])
    nll = nll_of_documents(nats, num_bytes, np.array([0, 0, 1]), np.ones(3, dtype=bool))
    assert nll.tolist() == [1.0, 1.0, 0.5]


def test_sources_are_compared_over_the_rows_of_a_document_that_all_of_them_have():
    """Row 0 is easy, row 1 is hard, and the left source is the better one on all that both have."""
    left, right = np.array([1.0, 9.0, 3.0, np.inf]), np.array([2.0, np.inf, np.inf, 8.0])
    num_bytes, documents = np.array([2, 2, 2, 2]), np.array([0, 0, 1, 1])
    is_common = np.isfinite(left) & np.isfinite(right)
    nll = [nll_of_documents(nats, num_bytes, documents, is_common) for nats in (left, right)]
    assert nll[0].tolist() == [0.5, 0.5, 1.5, np.inf]  # not 2.5: the right one has not row 1
    assert nll[1].tolist() == [1.0, np.inf, np.inf, 4.0]  # no common row in the second document


def nll_of_one_row(row_nll: float, settings: FuseSettings) -> np.ndarray:
    """The row between two others, the first of which was rejected."""
    return nll_of_positions(
        np.tile(NATS_PER_BYTE, 3),
        np.tile(NUM_BYTES, 3),
        np.array([np.inf, row_nll, 9.0]),
        np.array([0, 5, 10, 15]),
        settings,
    )[5:10]


def test_the_unit_token_has_the_nll_of_the_next_token():
    nll = nll_of_one_row(0.7, FuseSettings(unit="token"))
    np.testing.assert_allclose(nll, [1.0, 2.0, 0.5, 4.0, 0.0])


@pytest.mark.parametrize("span_tokens", [1, 2, 3, 4, 32])
def test_the_unit_span_is_a_window_that_reaches_as_far_to_both_sides(span_tokens):
    settings = FuseSettings(unit="span", span_tokens=span_tokens)
    nll = nll_of_one_row(0.7, settings)
    nats = NATS_PER_BYTE.astype(float) * NUM_BYTES
    for t in range(5):
        window = [at for at in range(5) if abs(at - t) <= span_tokens // 2]
        num_bytes = NUM_BYTES[window].sum()
        assert nll[t] == pytest.approx(nats[window].sum() / num_bytes if num_bytes else 0.0)


@pytest.mark.parametrize("unit", ["row", "document"])
def test_a_choice_per_row_or_document_has_one_nll(unit):
    nll = nll_of_one_row(0.7, FuseSettings(unit=unit))
    assert set(nll) == {0.7}


@pytest.mark.parametrize("unit", ["row", "span", "token"])
def test_a_rejected_row_has_infinite_nll_in_every_unit(unit):
    nll = nll_of_one_row(np.inf, FuseSettings(unit=unit))
    assert np.isinf(nll).all()
