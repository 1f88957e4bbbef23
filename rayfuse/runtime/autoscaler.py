"""The settings of a cluster's autoscaler: which machines it may add."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

HEAD = "node:__internal_head__"
"""The resource that Ray gives to the head alone."""


@dataclass(frozen=True)
class NodeKind:
    """Nodes that the autoscaler may add."""

    resources: dict[str, float]
    most: int


def limit_cpus(here: Sequence[NodeKind], may_come: Sequence[NodeKind]) -> int | None:
    """Return how many CPUs may be asked for at a time without a machine with GPUs being added.

    Ray adds one for work without GPUs too, where machines without them are used up. Those that are
    here are paid for already.

    Returns:
        None where there is no such danger, or nothing but such machines.
    """
    if not any(kind.resources.get("GPU") and kind.most for kind in may_come):
        return None
    cheap = [kind for kind in may_come if not kind.resources.get("GPU")]
    most = max(_count_cpus(here), _count_cpus(cheap))
    return int(most) if 1 <= most < math.inf else None


def _count_cpus(kinds: Sequence[NodeKind]) -> float:
    cpus = [(kind.resources.get("CPU", 0.0), kind.most) for kind in kinds]
    return float(sum(each * (math.inf if most < 0 else most) for each, most in cpus if each))


def find_autoscaling_config(gcs_address: str) -> str:
    """Return the settings of the autoscaler that runs on this machine for a cluster; "" if none."""
    option = "--autoscaling-config="
    port = gcs_address.rpartition(":")[2]
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = place.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended, or is another user's
            continue
        is_ours = any(each.endswith(f":{port}") for each in arguments)
        files = [each.removeprefix(option) for each in arguments if each.startswith(option)]
        if is_ours and files and Path(files[0]).expanduser().is_file():
            return Path(files[0]).expanduser().read_text()
    return ""


def read_node_kinds(text: str) -> tuple[NodeKind, ...]:
    """Return the node types of an autoscaler's settings, without the head's."""
    config = yaml.safe_load(text)
    kinds: list[NodeKind] = []
    for name, each in config["available_node_types"].items():
        if name != config.get("head_node_type"):
            resources = {key: float(value) for key, value in each.get("resources", {}).items()}
            kinds.append(NodeKind(resources, int(each.get("max_workers", 0))))
    return tuple(kinds)
