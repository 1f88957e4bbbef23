"""What an autoscaler may add, and what is asked of it."""

import pytest

from rayfuse.runtime.autoscaler import NodeKind, limit_cpus

CPU = {"CPU": 16.0}
GPU = {"CPU": 8.0, "GPU": 1.0}
HEAD = {"CPU": 0.0}


@pytest.mark.parametrize(
    ("here", "may_come", "expected"),
    [
        ([HEAD], [NodeKind(CPU, 8), NodeKind(GPU, 4)], 128),
        ([HEAD, GPU, GPU, *[CPU] * 8], [NodeKind(CPU, 8), NodeKind(GPU, 4)], 144),  # paid for
        ([HEAD], [NodeKind(CPU, -1), NodeKind(GPU, 4)], None),
        ([HEAD], [NodeKind(CPU, 8), NodeKind(GPU, 0)], None),
        ([HEAD], [NodeKind(GPU, 4)], None),  # there is no other way
        ([CPU], [], None),
    ],
)
def test_work_without_gpus_asks_for_no_more_than_machines_without_them_have(
    here, may_come, expected
):
    assert limit_cpus([NodeKind(each, 1) for each in here], may_come) == expected
