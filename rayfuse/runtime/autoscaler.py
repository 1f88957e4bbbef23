"""Read a cluster's autoscaler settings: which nodes it may add, so how much CPU work may wait."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

HEAD = "node:__internal_head__"
"""The resource that Ray gives to the head node only."""


@dataclass(frozen=True)
class NodeKind:
    """A type of node in the cluster, or one that the autoscaler may add."""

    resources: dict[str, float]
    max_count: int
    """-1 is unlimited."""

    def count_total(self, resource: str) -> float:
        """Count a resource over all nodes of this type; infinity if their count is unlimited."""
        amount = self.resources.get(resource, 0.0)
        if not amount:
            return 0.0
        return amount * (math.inf if self.max_count < 0 else self.max_count)


def limit_cpus(live: Sequence[NodeKind], addable: Sequence[NodeKind]) -> int | None:
    """Count the CPUs that can be requested at once without starting a GPU node.

    If no CPU node can be added any more, Ray's autoscaler adds GPU nodes for tasks that need only
    CPUs. Nodes that are up already may be used: they cost the same when idle.

    Args:
        live: The nodes that are up.
        addable: The node types that the autoscaler may add.

    Returns:
        None for no limit: no GPU node can be added, CPU nodes can without limit, or there are none.
    """
    if not any(kind.resources.get("GPU") and kind.max_count for kind in addable):
        return None
    cpu_kinds = [kind for kind in addable if not kind.resources.get("GPU")]
    # The most nodes of a kind include those that are up: both counts are not added.
    limit = max(_count_cpus(live), _count_cpus(cpu_kinds))
    return int(limit) if 1 <= limit < math.inf else None


def _count_cpus(kinds: Sequence[NodeKind]) -> float:
    return float(sum(kind.count_total("CPU") for kind in kinds))


def find_autoscaling_config(gcs_address: str) -> str:
    """Read the settings of the autoscaler process on this machine for a cluster; "" if none runs.

    Only on Linux: it reads /proc.

    The autoscaler has no API for them, but its command line names their file.

    Args:
        gcs_address: HOST:PORT of Ray's control store (GCS); a node may have several.
    """
    option = "--autoscaling-config="
    port = gcs_address.rpartition(":")[2]
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # the process has ended or belongs to another user
            continue
        is_this_cluster = any(argument.endswith(f":{port}") for argument in arguments)
        files = [text.removeprefix(option) for text in arguments if text.startswith(option)]
        if is_this_cluster and files and Path(files[0]).expanduser().is_file():
            return Path(files[0]).expanduser().read_text()
    return ""


def read_node_kinds(text: str) -> tuple[NodeKind, ...]:
    """Parse the node types of an autoscaler's settings, except the head's."""
    config = yaml.safe_load(text)
    kinds: list[NodeKind] = []
    for name, node_type in config["available_node_types"].items():
        if name != config.get("head_node_type"):
            resources = {key: float(value) for key, value in node_type.get("resources", {}).items()}
            kinds.append(NodeKind(resources, int(node_type.get("max_workers", 0))))
    return tuple(kinds)
