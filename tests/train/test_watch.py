"""What the driver says of trainings that run."""

import pytest

from rayfuse.storage.dataset import ShardError
from rayfuse.train.monitor import RunState
from rayfuse.train.stage import RunMonitor


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def watch(said) -> RunMonitor:
    def report(title: str, done: int, total: int, unit: str = "", note: str = "") -> None:
        said.append(f"{title} {done}/{total} {note}")

    return RunMonitor(report)


def make_states(fused: dict[int, float], clm: dict[int, float]) -> dict[str, RunState]:
    return {"fused": RunState(validations=fused), "clm": RunState(validations=clm)}


def test_fusion_that_is_worse_on_held_out_rows_is_warned_of_once(watch, said):
    watch.look(make_states({}, {}))
    watch.look(make_states({10: 2.0}, {10: 2.1}))
    watch.look(make_states({10: 2.0, 20: 2.3}, {10: 2.1}))  # nothing yet to compare step 20 with
    assert not said
    watch.look(make_states({10: 2.0, 20: 2.3}, {10: 2.1, 20: 2.2}))
    (warning,) = said
    assert "at step 20 fusion is worse on held-out rows, 2.3000 bits a byte against" in warning
    watch.look(make_states({30: 2.3}, {30: 2.2}))
    assert len(said) == 1


def test_a_run_without_a_baseline_is_not_compared(watch, said):
    watch.look({"fused": RunState(validations={10: 9.0})})
    assert not said


def test_what_a_run_tells_is_said_once_and_in_order(watch, said):
    state = RunState(step=1, num_steps=9, note="loss 1", told=["goes on"])
    watch.look({"fused": state})
    state.told.append("damaged")
    watch.look({"fused": state})
    assert said == [
        "train fused 0/0 goes on",
        "train fused 1/9 loss 1",
        "train fused 0/0 damaged",
        "train fused 1/9 loss 1",
    ]


def test_a_fault_that_is_final_is_raised_as_it_was(watch):
    with pytest.raises(ShardError, match="shard 3 is gone"):
        watch.look({"fused": RunState(fault=ShardError("shard 3 is gone"))})


def test_a_run_that_another_job_trains_is_told_of_once(watch, said):
    watch.tell_held("fused", "process 7 of there")
    watch.tell_held("fused", "process 7 of there")
    (text,) = said
    assert "process 7 of there trains it already" in text
