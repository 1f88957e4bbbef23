"""From shards on a disk to the steps of each worker."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from rayfuse.config.fuse import FuseSettings
from rayfuse.storage.dataset import DataSet
from rayfuse.train.batches import MicroBatch, Packing, Step, StepPlan, iterate_steps
from rayfuse.train.stage import check_data
from tests.train.data import open_reader, write_data

LENGTHS = [[5, 9, 2], [], [7], [3, 3, 3, 8, 1]]
Data = tuple[DataSet, dict[str, DataSet]]
PLAN = StepPlan(seed=3, epochs=2, rows_per_step=4)


@pytest.fixture
def data(tmp_path) -> Data:
    return write_data(tmp_path / "data", LENGTHS)


def list_steps(
    data: Data, *, first_step: int = 0, workers: int = 1, tokens: int = 16
) -> list[list[Step]]:
    """Return all steps of each worker."""
    return [
        list(
            iterate_steps(
                open_reader(*data),
                Packing(tokens, 2, True),
                PLAN,
                rank=rank,
                num_workers=workers,
                first_step=first_step,
            )
        )
        for rank in range(workers)
    ]


def list_arrays(batch: MicroBatch) -> list[Any]:
    return [value for value in (vars(batch) | vars(batch.top)).values() if value is not batch.top]


def assert_equal(ours: list[Step], theirs: list[Step]) -> None:
    for step, other in zip(ours, theirs, strict=True):
        assert step.batch_id == other.batch_id
        for left, right in zip(step.batches, other.batches, strict=True):
            for array, expected in zip(list_arrays(left), list_arrays(right), strict=True):
                np.testing.assert_array_equal(array, expected)


def count_positions(steps: list[Step]) -> Counter[tuple[float, ...]]:
    """Count what each position is to learn: next token, head, tail."""
    return Counter(
        (int(batch.next_ids[at]), *map(float, batch.top.probs[at]), float(batch.top.tail[at]))
        for step in steps
        for batch in step.batches
        for at in range(len(batch.positions))
    )


@pytest.mark.parametrize("workers", [2, 3, 8, 13])
def test_any_number_of_workers_trains_on_the_same_steps(workers, data):
    """More workers than shards, than rows of a step, than rows at all."""
    (alone,) = list_steps(data)
    shared = list_steps(data, workers=workers)
    assert len(alone) == 6
    for number, step in enumerate(alone):
        parts = [steps[number] for steps in shared]
        assert {part.batch_id for part in parts} == {step.batch_id}
        assert count_positions(parts) == count_positions([step])
    assert alone[0].batch_id != alone[3].batch_id  # another epoch, another order
    assert count_positions(alone[:3]) == count_positions(alone[3:])


@pytest.mark.parametrize("first_step", [1, 3, 5, 6])
def test_steps_resumed_at_any_step_are_those_of_an_uninterrupted_run(first_step, data):
    (expected,) = list_steps(data)
    (rest,) = list_steps(data, first_step=first_step)
    assert_equal(rest, expected[first_step:])


def test_a_row_longer_than_a_sequence_is_not_split(data):
    (short,) = list_steps(data, tokens=4)
    (long,) = list_steps(data, tokens=64)
    assert count_positions(short) == count_positions(long)
    assert max(batch.token_ids.shape[1] for step in short for batch in step.batches) == 9


def test_no_rows_at_all_make_no_steps(tmp_path):
    for name, lengths in (("none", []), ("empty", [[], []])):
        corpus, aligned = write_data(tmp_path / name, lengths)
        reader = open_reader(corpus, aligned)
        assert not list(iterate_steps(reader, Packing(8, 1, True), PLAN, rank=0, num_workers=2))


def test_training_does_not_begin_on_no_rows_or_on_incomplete_data(data, tmp_path):
    corpus, aligned = data
    check_data(corpus, *aligned.values())
    empty, _ = write_data(tmp_path / "empty", [[], []])
    with pytest.raises(ValueError, match="corpus has no rows to train on"):
        check_data(empty, *aligned.values())
    aligned["b"].drop_manifest()
    with pytest.raises(ValueError, match="b is incomplete; run `rayfuse corpus`"):
        check_data(corpus, *aligned.values())


@pytest.mark.parametrize("method", ["min_ce", "avg_ce"])
def test_a_source_of_weight_0_is_not_read_and_changes_no_number(method, data, tmp_path):
    corpus, aligned = data
    for shard in aligned["b"].commits().values():
        (tmp_path / "data" / aligned["b"].folder / shard.file).unlink()
    silent = FuseSettings(method=method, weights={"b": 0.0})
    with_it = open_reader(corpus, aligned, silent)
    without = open_reader(corpus, {"a": aligned["a"]}, FuseSettings(method=method))
    assert with_it.names == without.names == ("a",)
    packing = Packing(16, 2, True)
    steps = [
        list(iterate_steps(reader, packing, PLAN, rank=0, num_workers=1))
        for reader in (with_it, without)
    ]
    assert_equal(*steps)
