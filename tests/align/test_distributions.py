import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rayfuse.align.distributions import TopEntries, map_entries, merge_entries, put_true_token


def random_entries(seed: int, positions: int = 9, entries: int = 6) -> TopEntries:
    random = np.random.default_rng(seed)
    ids = np.stack([random.permutation(20)[:entries] for _ in range(positions)]).astype(np.int32)
    probs = random.dirichlet(np.full(entries + 1, 0.5), size=positions)
    order = np.argsort(-probs[:, :entries], axis=1)
    top = np.take_along_axis(probs[:, :entries], order, axis=1)
    return TopEntries(ids, top, probs[:, entries])


def total(entries: TopEntries) -> np.ndarray:
    return entries.probs.sum(axis=1) + entries.tail


@given(seed=st.integers(0, 10_000))
def test_mapping_truth_and_merging_keep_all_mass(seed):
    random = np.random.default_rng(seed)
    entries = random_entries(seed)
    vocab_map = random.integers(-1, 5, size=20).astype(np.int32)
    is_first = np.zeros(entries.ids.shape, dtype=bool)
    is_first[::2, 1] = True
    mapped = map_entries(entries, vocab_map)
    true = put_true_token(
        mapped,
        is_first_piece=is_first & (mapped.ids >= 0),
        first_probs=random.random(9),
        continuation_probs=random.random(9),
        true_ids=np.full(9, 3),
    )
    merged = merge_entries(true, 4, np.full(9, 3))
    for step in (mapped, true, merged):
        np.testing.assert_allclose(total(step), 1.0, atol=1e-12)
        assert (step.probs >= 0).all()
        assert (step.tail >= 0).all()


@given(seed=st.integers(0, 10_000))
def test_merged_entries_are_sorted_and_distinct(seed):
    entries = random_entries(seed)
    few = TopEntries(entries.ids % 4, entries.probs, entries.tail)
    merged = merge_entries(few, 5, np.full(9, 2))
    assert (np.diff(merged.probs, axis=1) <= 0).all()
    for ids in merged.ids:
        real = ids[ids >= 0]
        assert len(set(real.tolist())) == len(real)


def test_entries_that_meet_on_one_token_are_added():
    entries = TopEntries(
        np.array([[7, 3, 7]], dtype=np.int32), np.array([[0.4, 0.3, 0.2]]), np.array([0.1])
    )
    merged = merge_entries(entries, 3, np.array([7]))
    assert merged.ids.tolist() == [[7, 3, -1]]
    np.testing.assert_allclose(merged.probs, [[0.6, 0.3, 0.0]])


def test_a_true_token_outside_the_head_is_taken_from_the_tail():
    entries = TopEntries(np.array([[1]], dtype=np.int32), np.array([[0.7]]), np.array([0.3]))
    true = put_true_token(
        entries,
        is_first_piece=np.array([[False]]),
        first_probs=np.array([0.2]),
        continuation_probs=np.array([0.5]),
        true_ids=np.array([9]),
    )
    merged = merge_entries(true, 2, np.array([9]))
    assert merged.ids.tolist() == [[1, 9]]
    np.testing.assert_allclose(merged.probs, [[0.7, 0.1]])
    np.testing.assert_allclose(merged.tail, [0.2])


def test_the_true_token_stays_however_unlikely_it_is():
    entries = TopEntries(
        np.array([[4, 5, 6]], dtype=np.int32), np.array([[0.5, 0.3, 0.01]]), np.array([0.19])
    )
    merged = merge_entries(entries, 2, np.array([6]))
    assert merged.ids.tolist() == [[4, 6]]
    np.testing.assert_allclose(merged.probs, [[0.5, 0.01]])
    np.testing.assert_allclose(merged.tail, [0.49])
