"""Results of an evaluation: intact, and of the model and the rows that there are now."""

import pytest

from rayfuse.evaluate.results import is_scored
from rayfuse.evaluate.scores import DocumentScore, Evaluation, parse_evaluation
from rayfuse.evaluate.task_scores import TaskScore, parse_task_score
from rayfuse.storage.seal import ShardError
from rayfuse.storage.store import LocalStore

SCORE = Evaluation(
    "fused", "fused", "x", [DocumentScore("d", "", 3, 1.5)], 2.0, {"held_out": "a", "model": "b"}
)


def test_results_come_back_as_they_were():
    assert parse_evaluation(SCORE.to_json()) == SCORE
    task = TaskScore("fused", "piqa", (), 1.0, {"model": "b"}, "00ff")
    assert parse_task_score(task.to_json()) == task


@pytest.mark.parametrize("parse", [parse_evaluation, parse_task_score])
@pytest.mark.parametrize("data", [b"", b"{}", b"[]", SCORE.to_json().replace(b"1.5", b"0.75")])
def test_a_corrupt_result_is_refused_by_name(data, parse):
    with pytest.raises(ShardError, match="evaluate/fused"):
        parse(data, "evaluate/fused-1.json")


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"held_out": "a", "model": "b"}, True),
        ({"held_out": "a"}, True),  # the model is being trained again
        ({"held_out": "a", "model": "c"}, False),
        ({"held_out": "z", "model": "b"}, False),
    ],
)
def test_a_result_of_another_model_or_other_rows_is_stale(inputs, expected, tmp_path):
    store = LocalStore(str(tmp_path))
    assert not is_scored(store, "evaluate/fused-1.json", inputs)
    store.write("evaluate/fused-1.json", SCORE.to_json())
    assert is_scored(store, "evaluate/fused-1.json", inputs) == expected
