import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rayfuse.storage.codec import decode_probs, encode_probs


def random_record(seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    probs = random.dirichlet(np.full(40, 0.2), size=50)
    probs = -np.sort(-probs, axis=1)
    return probs[:, :16], probs[:, 16:].sum(axis=1)


@given(seed=st.integers(0, 1000))
def test_stored_log_probabilities_differ_by_less_than_a_thousandth_of_a_nat(seed):
    head, tail = random_record(seed)
    with np.errstate(divide="ignore"):
        tail_logprobs = np.log(np.maximum(tail, 1e-14)).astype(np.float16)
        differences = encode_probs(head)
    ids = np.zeros(head.shape, dtype=np.int32)
    stored = decode_probs(differences, ids, tail_logprobs)
    mass = stored.sum(axis=1, dtype=np.float64) + np.exp(tail_logprobs.astype(np.float64))
    np.testing.assert_allclose(mass, 1.0, atol=1e-6)
    assert (np.diff(stored, axis=1) <= 0).all()
    logs = np.log(np.maximum(head, 1e-300)) - np.log(stored)
    divergence = (head * logs).sum(axis=1)
    assert np.abs(divergence).mean() < 1e-3


def test_entries_that_are_not_there_decode_to_no_mass():
    probs = np.array([[0.5, 0.25, 1e-30]])
    ids = np.array([[4, 2, -1]], dtype=np.int32)
    stored = decode_probs(encode_probs(probs), ids, np.log(np.array([0.25])))
    assert stored[0, 2] == 0
    np.testing.assert_allclose(stored[0, :2].sum(), 0.75, rtol=1e-6)
