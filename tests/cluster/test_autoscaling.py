"""From a head alone: a run makes the machines come that its recipe asks for, and lets them go."""

import pytest

from tests.cluster.fake_cloud import run_and_watch
from tests.cluster.job_runs import IS_LONG

only_long = pytest.mark.skipif(
    not IS_LONG, reason="needs the machine for itself, two minutes long; RAYFUSE_LONG_CHAOS=1"
)
pytestmark = [only_long, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def test_machines_of_the_kinds_asked_for_come_early_are_used_and_go(tmp_path):
    growth = run_and_watch(tmp_path)
    print(growth.describe())
    assert growth.may_have == "8.0 2.0 0.0 4"
    most = growth.most()
    assert (most["l4"], most["a10g"]) == (2, 0)  # min_actors, each with a GPU; nobody asked
    assert most["a100"] >= 1
    assert growth.first("l4") < growth.ends["corpus"] < growth.ends["capture"]
    assert growth.first("a100") < growth.ends["train"]  # a task for a CPU may bring one sooner
    assert growth.is_empty
