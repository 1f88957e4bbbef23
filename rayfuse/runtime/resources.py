"""Which machines a cluster has or may get, and having them started before they are needed."""

import math
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
from rayfuse.runtime.ray_internals import has_autoscaler_v2, read_node_groups

Bundle = dict[str, float]
"""What one actor asks of Ray, by resource."""

TASK_RETRIES = 20
"""How often a task whose process died is begun again. Ray's own 3 are few where machines are taken
at will; without a limit a task that kills its own process would never fail."""

REPORT_WAIT_SECONDS = 60.0
"""Without an actor or a worker, until a note reports which resources are waited for."""


def count_reachable(resource: str, accelerator_type: str | None = None) -> float:
    """Return how much of a resource the cluster has, or may have once its autoscaler has grown it.

    Args:
        resource: `CPU`, `GPU` or one of the cluster's own.
        accelerator_type: Count machines with this kind of GPU alone.

    Returns:
        Infinity where the autoscaler has no limit.
    """
    there = _list_here()
    may_come = _read_autoscaler_once(ray.get_runtime_context().gcs_address)[1] or ()
    name = None if accelerator_type is None else _name_kind(accelerator_type)
    sums = [
        sum(
            each.resources.get(resource, 0) * (math.inf if each.most < 0 else each.most)
            for each in kinds
            if name in (None, *each.resources) and each.resources.get(resource)
        )
        for kinds in (there, may_come)
    ]
    return float(max(sums))


def limit_cpu_tasks() -> int | None:
    """Return how many tasks of one CPU may run at a time; None where it does not matter."""
    may_come = _read_autoscaler_once(ray.get_runtime_context().gcs_address)[1] or ()
    return limit_cpus(_list_here(), may_come)


def _list_here() -> list[NodeKind]:
    return [NodeKind(node["Resources"], 1) for node in ray.nodes() if node["Alive"]]


def read_autoscaler() -> tuple[bool, tuple[NodeKind, ...] | None]:
    """Return whether the cluster grows by itself, and what may come, as far as it can be read."""
    groups = read_node_groups()
    if groups is not None:
        return True, tuple(NodeKind(resources, most) for resources, most in groups)
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
    """Return the resource that Ray gives to machines with a kind of GPU."""
    return f"accelerator_type:{accelerator_type}"


def count_default_gpus(accelerator_type: str | None) -> float:
    """Return the GPUs of one actor or worker that does not say: a whole one if there can be any."""
    return 1.0 if accelerator_type is not None or count_reachable("GPU") > 0 else 0.0


def count_actor_gpus(source: SourceSettings) -> float:
    """Return the GPUs of one actor of a source."""
    return count_default_gpus(source.accelerator_type) if source.gpus is None else source.gpus


def gpu_options(gpus: float, accelerator_type: str | None) -> dict[str, Any]:
    """Return what Ray is asked for of GPUs, for one actor or task."""
    options: dict[str, Any] = {"num_gpus": gpus} if gpus else {}
    return options if accelerator_type is None else options | {"accelerator_type": accelerator_type}


def describe_needs(resources: Bundle, accelerator_type: str | None) -> str:
    """Describe what one actor or worker needs, such as `1 CPU, 1 GPU (L4)`.

    Args:
        resources: Amounts by resource; those of 0 are skipped.
        accelerator_type: The kind of GPU, as Ray names it; None for any.
    """
    needs = ", ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount)
    return needs if accelerator_type is None else f"{needs} ({accelerator_type})"


def list_bundles(source: SourceSettings) -> list[Bundle]:
    """Return what a source's first actors need of GPUs; nothing where it runs on CPUs."""
    gpus = count_actor_gpus(source)
    bundle: Bundle = {"GPU": gpus} if gpus else {}
    if gpus and source.accelerator_type is not None:
        bundle[_name_kind(source.accelerator_type)] = 0.001  # as Ray itself asks for a kind
    return [bundle] * source.min_actors if bundle else []


@contextmanager
def prewarm_nodes(groups: Sequence[Sequence[Bundle]]) -> Iterator[None]:
    """Have machines started for what comes next, while something else runs.

    Nobody uses these placement groups: their wish brings the machines, and ends with this job
    however it ends. (`ray.autoscaler.sdk.request_resources` outlives a job that is killed, and
    goes on paying.)

    Args:
        groups: The bundles of each source; those of one group are had together.
    """
    asked = [placement_group([*bundles], strategy="PACK") for bundles in groups if bundles]
    try:
        yield
    finally:
        for each in asked:
            remove_placement_group(each)
