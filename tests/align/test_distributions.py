import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfuse.align.distributions import map_entries, merge_entries, put_true_token
from rayfuse.config.load import parse_recipe
from rayfuse.config.overrides import RecipeError
from rayfuse.storage.codec import TopK

NUM_POSITIONS, NUM_ENTRIES, NUM_IDS = 9, 6, 12


def make_entries(ids, probs, tail) -> TopK:
    """Lay out entries in memory entries first, as `align_shard` does."""
    return TopK(
        np.asfortranarray(ids, dtype=np.int32),
        np.asfortranarray(probs, dtype=np.float32),
        np.array(tail, dtype=np.float32),
    )


def random_entries(seed: int) -> TopK:
    random = np.random.default_rng(seed)
    probs = random.dirichlet(np.full(NUM_ENTRIES + 1, 0.4), size=NUM_POSITIONS)
    ids = np.stack([random.permutation(NUM_IDS)[:NUM_ENTRIES] for _ in range(NUM_POSITIONS)])
    return make_entries(ids, -np.sort(-probs[:, :-1], axis=1), probs[:, -1])


def merge(entries: TopK, true_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    merged = merge_entries(entries, true_ids)
    return merged.ids, merged.probs, merged.tail


def total(entries: TopK) -> np.ndarray:
    return entries.probs.sum(axis=1) + entries.tail


def dense(ids: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Add up entries in a row per position over all ids."""
    out = np.zeros((len(ids), NUM_IDS))
    for position in range(len(ids)):
        for token, p in zip(ids[position], probs[position], strict=True):
            if token >= 0:
                out[position, token] += p
    return out


@given(seed=st.integers(0, 10_000))
def test_mapping_truth_and_merging_keep_all_mass(seed):
    random = np.random.default_rng(seed)
    entries = random_entries(seed)
    true_ids = random.integers(0, NUM_IDS, NUM_POSITIONS).astype(np.int32)
    vocab_map = random.integers(-1, NUM_IDS, NUM_IDS).astype(np.int32)
    mapped = map_entries(entries, vocab_map[entries.ids])
    is_first = np.zeros(entries.ids.shape, dtype=bool)
    is_first[random.random(NUM_POSITIONS) < 0.5, random.integers(0, NUM_ENTRIES)] = True
    true = put_true_token(
        mapped,
        is_first_piece=is_first,
        first_probs=random.random(NUM_POSITIONS).astype(np.float32),
        continuation_probs=random.random(NUM_POSITIONS).astype(np.float32),
        true_ids=true_ids,
    )
    for step in (entries, mapped, true):
        np.testing.assert_allclose(total(step), 1.0, atol=1e-6)
        assert (step.probs >= 0).all()
    _ids, probs, tail = merge(true, true_ids)
    np.testing.assert_allclose(probs.sum(axis=1) + tail, 1.0, atol=1e-6)


@given(seed=st.integers(0, 10_000))
def test_merging_equals_adding_up_in_a_dense_row_and_taking_the_best(seed):
    random = np.random.default_rng(seed)
    entries = random_entries(seed)
    few = TopK(entries.ids % 5, entries.probs, entries.tail)
    true_ids = random.integers(0, 5, NUM_POSITIONS).astype(np.int32)
    ids, probs, _tail = merge(few, true_ids)
    assert (np.diff(probs, axis=1) <= 0).all()
    sums = dense(few.ids, few.probs)
    for position, kept in enumerate(ids):
        real = kept[kept >= 0]
        assert len(set(real.tolist())) == len(real)
        np.testing.assert_allclose(probs[position, kept >= 0], sums[position, real], rtol=1e-6)
        left_out = set(np.flatnonzero(sums[position]).tolist()) - set(real.tolist())
        assert len(left_out) <= 1  # five distinct at most, of six entries
        assert true_ids[position] not in left_out


def test_entries_that_meet_on_one_token_are_added():
    ids, probs, tail = merge(
        make_entries([[7, 3, 7, -1]], [[0.4, 0.3, 0.2, 0]], [0.1]), np.array([7], dtype=np.int32)
    )
    assert ids.tolist() == [[7, 3, -1]]
    np.testing.assert_allclose(probs, [[0.6, 0.3, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(tail, [0.1])


def test_of_equal_probabilities_the_earlier_comes_first_whatever_its_id():
    for ids in ([[5, 2, 9, 1]], [[1, 9, 2, 5]]):
        entries = make_entries(ids, [[0.25, 0.25, 0.25, 0.0]], [0.25])
        assert merge(entries, np.array([2], dtype=np.int32))[0].tolist() == [ids[0][:3]]


def test_a_true_token_outside_the_head_is_taken_from_the_tail():
    true = put_true_token(
        make_entries([[1, 2]], [[0.6, 0.1]], [0.3]),
        is_first_piece=np.array([[False, False]]),
        first_probs=np.array([0.2], dtype=np.float32),
        continuation_probs=np.array([0.5], dtype=np.float32),
        true_ids=np.array([9], dtype=np.int32),
    )
    ids, probs, tail = merge(true, np.array([9], dtype=np.int32))
    assert sorted(ids[0].tolist()) == [1, 9]
    np.testing.assert_allclose(probs, [[0.6, 0.1]], rtol=1e-6)
    np.testing.assert_allclose(tail, [0.3], rtol=1e-6)  # 0.3 - 0.1 for 9, and 0.1 of token 2


def test_the_true_token_stays_however_unlikely_it_is():
    entries = make_entries([[4, 5, 6]], [[0.5, 0.3, 0.01]], [0.19])
    ids, probs, tail = merge(entries, np.array([6], dtype=np.int32))
    assert ids.tolist() == [[4, 6]]
    np.testing.assert_allclose(probs, [[0.5, 0.01]], rtol=1e-6)
    np.testing.assert_allclose(tail, [0.49], rtol=1e-6)


def test_a_spanning_token_gets_the_product_and_the_rest_of_its_first_piece_is_tail():
    true = put_true_token(
        make_entries([[1, 2]], [[0.6, 0.2]], [0.2]),
        is_first_piece=np.array([[True, False]]),
        first_probs=np.array([0.6], dtype=np.float32),
        continuation_probs=np.array([0.5], dtype=np.float32),
        true_ids=np.array([8], dtype=np.int32),
    )
    ids, probs, tail = merge(true, np.array([8], dtype=np.int32))
    assert ids.tolist() == [[8, 2]]
    assert probs[0].tolist() == pytest.approx([0.3, 0.2])
    assert tail[0] == pytest.approx(0.5)


def test_255_entries_and_the_true_token_keep_their_order():
    random = np.random.default_rng(0)
    ids = random.permutation(300)[:256].astype(np.int32)[None]
    entries = TopK(ids, np.full((1, 256), 1 / 256, dtype=np.float32), np.zeros(1))
    kept, probs, tail = merge(entries, ids[0, :1])
    assert kept[0].tolist() == ids[0, :255].tolist()
    assert probs.sum() + tail[0] == pytest.approx(1.0)


def test_more_entries_than_there_are_ranks_are_refused_in_the_recipe():
    values = {
        "storage": "s",
        "corpus": {"documents": "d"},
        "target": {"model": "t"},
        "sources": [{"name": "a", "model": "a"}],
    }
    assert parse_recipe(values | {"capture": {"top_k": 255}}).capture.top_k == 255
    with pytest.raises(RecipeError, match=r"capture.top_k is 256: .* less than or equal to 255"):
        parse_recipe(values | {"capture": {"top_k": 256}})
