"""Count a cluster's resources, request GPUs, and start nodes before they are needed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayfuse.config.models import SourceSettings
from rayfuse.runtime.autoscaler import (
    HEAD,
    NodeKind,
    find_autoscaling_config,
    limit_cpus,
    read_node_kinds,
)
from rayfuse.runtime.memory import GIB, MEMORY, check_room, find_room
from rayfuse.runtime.ray_internals import has_autoscaler_v2, read_node_groups

Bundle = dict[str, float]
"""The resources that one actor requests from Ray, by name."""

TASK_RETRIES = 20
"""Retries of a task after its process died. Ray's default of 3 is too few on spot nodes; without a
limit, a task that crashes its own process would never fail."""

REPORT_WAIT_SECONDS = 60.0
"""Without an actor or a worker, until a note reports which resources are waited for."""


def count_reachable(resource: str, accelerator_type: str | None = None) -> float:
    """Count how much of a resource the cluster has now, or may have after its autoscaler scaled up.

    Args:
        resource: `CPU`, `GPU` or one of the cluster's own.
        accelerator_type: Count only nodes with this kind of GPU.

    Returns:
        Infinity if the autoscaler has no limit.
    """
    live = _list_live()
    addable = _read_autoscaler_once(ray.get_runtime_context().gcs_address)[1] or ()
    name = None if accelerator_type is None else _name_kind(accelerator_type)
    totals = [
        sum(kind.count_total(resource) for kind in kinds if name in (None, *kind.resources))
        for kinds in (live, addable)
    ]
    return float(max(totals))


def limit_cpu_tasks() -> int | None:
    """Limit the tasks of one CPU that run at a time, so that no GPU node is added for them.

    Returns:
        None if there is no limit.
    """
    addable = _read_autoscaler_once(ray.get_runtime_context().gcs_address)[1] or ()
    return limit_cpus(_list_live(), addable)


def _list_live() -> list[NodeKind]:
    return [NodeKind(node["Resources"], 1) for node in ray.nodes() if node["Alive"]]


def read_autoscaler() -> tuple[bool, tuple[NodeKind, ...] | None]:
    """Detect an autoscaler, and read the node types that it may add; None if they are unknown."""
    groups = read_node_groups()
    if groups is not None:
        return True, tuple(NodeKind(resources, max_count) for resources, max_count in groups)
    alive = [node for node in ray.nodes() if node["Alive"]]
    head = next((node for node in alive if HEAD in node["Resources"]), alive[0])
    options: dict[str, Any] = {
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(head["NodeID"], soft=False),
    }
    gcs = ray.get_runtime_context().gcs_address
    text = ray.get(ray.remote(**options)(find_autoscaling_config).remote(gcs))
    if text:
        return True, read_node_kinds(text)
    return has_autoscaler_v2(), None


@cache
def _read_autoscaler_once(gcs_address: str) -> tuple[bool, tuple[NodeKind, ...] | None]:
    return read_autoscaler()


def _name_kind(accelerator_type: str) -> str:
    """Name the resource that Ray gives to nodes with a kind of GPU."""
    return f"accelerator_type:{accelerator_type}"


def count_default_gpus(accelerator_type: str | None) -> float:
    """Count the GPUs of an actor or worker without a setting: 1 if the cluster can have any."""
    return 1.0 if accelerator_type is not None or count_reachable("GPU") > 0 else 0.0


def count_actor_gpus(source: SourceSettings) -> float:
    """Count the GPUs of one actor of a source."""
    return count_default_gpus(source.accelerator_type) if source.gpus is None else source.gpus


def gpu_options(gpus: float, accelerator_type: str | None) -> dict[str, Any]:
    """Return Ray's options that request the GPUs of one actor or task."""
    options: dict[str, Any] = {"num_gpus": gpus} if gpus else {}
    return options if accelerator_type is None else options | {"accelerator_type": accelerator_type}


def reserve_memory(
    needs: Bundle, accelerator_type: str | None, num_bytes: float, setting: str | None = None
) -> float:
    """Decide how much memory an actor or a task requests; 0 where Ray could not place it then.

    Args:
        needs: The other resources that it requests.
        accelerator_type: The kind of GPU.
        num_bytes: What it needs.
        setting: The setting to name if no node has as much; None to request what the largest has.

    Raises:
        NoRoomError: No node has as much.
    """
    has_autoscaler, addable = _read_autoscaler_once(ray.get_runtime_context().gcs_address)
    if accelerator_type is not None:
        needs = needs | {_name_kind(accelerator_type): 0.001}
    known = () if addable is None and not has_autoscaler else addable
    room = find_room(needs, _list_live(), known)
    if room is None:
        return 0.0
    if setting is not None:
        check_room(num_bytes, room, setting)
    return float(min(num_bytes, room))


def memory_options(num_bytes: float) -> dict[str, Any]:
    """Return Ray's options that request memory; none for 0 bytes."""
    return {"memory": int(num_bytes)} if num_bytes >= 1 else {}


def describe_needs(resources: Bundle, accelerator_type: str | None) -> str:
    """Describe what one actor or worker needs, such as `1 CPU, 1 GPU, 3.2 GiB memory (L4)`.

    Args:
        resources: Amounts by resource, memory in bytes; those of 0 are skipped.
        accelerator_type: The kind of GPU, as Ray names it; None for any.
    """
    needs = ", ".join(
        f"{amount / GIB:.1f} GiB {name}" if name == MEMORY else f"{amount:g} {name}"
        for name, amount in resources.items()
        if amount
    )
    return needs if accelerator_type is None else f"{needs} ({accelerator_type})"


def list_bundles(source: SourceSettings) -> list[Bundle]:
    """List the GPU bundles of a source's first actors; empty if the source runs on CPUs."""
    gpus = count_actor_gpus(source)
    bundle: Bundle = {"GPU": gpus} if gpus else {}
    if gpus and source.accelerator_type is not None:
        bundle[_name_kind(source.accelerator_type)] = 0.001  # the amount that Ray itself requests
    return [bundle] * source.min_actors if bundle else []


def on_driver_node() -> dict[str, Any]:
    """Return Ray's options that keep an actor on the driver's node, so that it lives as long."""
    node = ray.get_runtime_context().get_node_id()
    return {
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
    }


@contextmanager
def prewarm_nodes(groups: Sequence[Sequence[Bundle]]) -> Iterator[None]:
    """Start nodes for the next stage while the current one runs.

    No actor uses these placement groups: a pending group makes the autoscaler add nodes, and Ray
    removes it with this job, however the job ends. `ray.autoscaler.sdk.request_resources` would
    keep the nodes up, and cost money, after a job that was killed.

    Args:
        groups: The bundles of each source; the bundles of one group are reserved together.
    """
    pending = [placement_group([*bundles], strategy="PACK") for bundles in groups if bundles]
    try:
        yield
    finally:
        for group in pending:
            remove_placement_group(group)
