"""Read the settings of a cluster's autoscaler: which nodes it may add."""

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


def limit_cpus(here: Sequence[NodeKind], may_come: Sequence[NodeKind]) -> int | None:
    """Count the CPUs that may be requested at a time without a GPU node being added for them.

    If no CPU node can be added any more, Ray's autoscaler adds GPU nodes for tasks that need only
    CPUs. Nodes that are up already may be used: they cost the same when idle.

    Args:
        here: The nodes that are up.
        may_come: The node types that the autoscaler may add.

    Returns:
        None if no GPU node can be added, or if there are only GPU nodes.
    """
    if not any(kind.resources.get("GPU") and kind.max_count for kind in may_come):
        return None
    cpu_kinds = [kind for kind in may_come if not kind.resources.get("GPU")]
    limit = max(_count_cpus(here), _count_cpus(cpu_kinds))
    return int(limit) if 1 <= limit < math.inf else None


def _count_cpus(kinds: Sequence[NodeKind]) -> float:
    return float(sum(kind.count_total("CPU") for kind in kinds))


def find_autoscaling_config(gcs_address: str) -> str:
    """Read the settings of the autoscaler process on this machine for a cluster; "" if none runs.

    The autoscaler has no API for them, but its command line names their file.

    Args:
        gcs_address: HOST:PORT of the cluster's GCS; several clusters may run on one machine.
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
