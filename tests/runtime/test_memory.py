"""How much memory an actor reserves: what it needs, where Ray knows the memory of its nodes."""

import pytest

from rayfuse.config.base import UserError
from rayfuse.runtime.autoscaler import NodeKind
from rayfuse.runtime.memory import GIB, check_room, find_room

SMALL = NodeKind({"CPU": 4.0, "memory": 8.0 * GIB}, 1)
LARGE = NodeKind({"CPU": 16.0, "memory": 64.0 * GIB}, 3)
GPU = NodeKind({"CPU": 8.0, "GPU": 1.0, "accelerator_type:L4": 1.0, "memory": 20.0 * GIB}, 2)
UNKNOWN = NodeKind({"CPU": 8.0, "GPU": 1.0}, 2)


def test_room_is_that_of_the_largest_node_with_all_else():
    assert find_room({"CPU": 1.0}, [SMALL], []) == 8 * GIB
    assert find_room({"CPU": 1.0}, [SMALL], [LARGE, GPU]) == 64 * GIB
    assert find_room({"CPU": 1.0, "GPU": 1.0}, [SMALL], [LARGE, GPU]) == 20 * GIB
    needs = {"CPU": 1.0, "GPU": 0.5, "accelerator_type:L4": 0.001}
    assert find_room(needs, [SMALL], [GPU, UNKNOWN]) == 20 * GIB


def test_nothing_is_reserved_where_ray_would_wait_for_a_node_type_without_memory():
    assert find_room({"CPU": 1.0, "GPU": 1.0}, [SMALL, GPU], [UNKNOWN]) is None
    assert find_room({"CPU": 1.0}, [SMALL], None) is None  # an autoscaler of unknown node types
    assert find_room({"CPU": 1.0, "GPU": 1.0}, [SMALL], []) is None  # no node has a GPU yet
    assert find_room({"CPU": 1.0, "GPU": 1.0}, [GPU], [NodeKind(UNKNOWN.resources, 0)]) == 20 * GIB


def test_more_than_the_largest_node_has_is_an_error_with_value_and_remedy():
    check_room(8.0 * GIB, 8.0 * GIB, "sources.a.memory_gib")
    message = (
        r"sources.a.memory_gib is 9.5, the host memory of one actor in GiB, more than the 8.0 .*"
        r"add a larger node, lower capture.chunk_positions .*\(0 reserves none\)"
    )
    with pytest.raises(UserError, match=message):
        check_room(9.5 * GIB, 8.0 * GIB, "sources.a.memory_gib")
