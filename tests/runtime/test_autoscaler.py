"""How many CPUs may be requested before an autoscaler adds GPU nodes."""

import pytest

from rayfuse.runtime.autoscaler import NodeKind, limit_cpus

CPU = {"CPU": 16.0}
GPU = {"CPU": 8.0, "GPU": 1.0}
HEAD = {"CPU": 0.0}


@pytest.mark.parametrize(
    ("here", "may_come", "expected"),
    [
        ([HEAD], [NodeKind(CPU, 8), NodeKind(GPU, 4)], 128),
        ([HEAD, GPU, GPU, *[CPU] * 8], [NodeKind(CPU, 8), NodeKind(GPU, 4)], 144),  # they are up
        ([HEAD], [NodeKind(CPU, -1), NodeKind(GPU, 4)], None),
        ([HEAD], [NodeKind(CPU, 8), NodeKind(GPU, 0)], None),
        ([HEAD], [NodeKind(GPU, 4)], None),  # only GPU nodes can come
        ([CPU], [], None),
    ],
)
def test_cpu_tasks_request_no_more_than_the_cpu_nodes_have(here, may_come, expected):
    assert limit_cpus([NodeKind(node, 1) for node in here], may_come) == expected
