"""The settings of a cluster's autoscaler: which machines it may add."""

from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class NodeKind:
    """Nodes that the autoscaler may add."""

    resources: dict[str, float]
    most: int


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
