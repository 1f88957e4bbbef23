"""Which machines a cluster has or may get, and having them started before they are needed."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ray
from ray._private.state import state as cluster_state  # no public way to ask what may come
from ray.util.placement_group import placement_group, remove_placement_group

from rayfuse.recipe import SourceSettings

Bundle = dict[str, float]
"""What one actor asks of Ray, by resource."""


def count_reachable(resource: str, accelerator_type: str | None = None) -> float:
    """Return how much of a resource the cluster has, or may have once its autoscaler has grown it.

    Args:
        resource: `CPU`, `GPU` or one of the cluster's own.
        accelerator_type: Count machines with this kind of GPU alone.

    Returns:
        Infinity where the autoscaler has no limit.
    """
    there = [(1.0, node["Resources"]) for node in ray.nodes() if node["Alive"]]
    config = cluster_state.get_cluster_config()  # None without an autoscaler
    groups = [] if config is None else config.node_group_configs
    may_come = [(_limit(group.max_count), dict(group.resources)) for group in groups]
    kind = None if accelerator_type is None else _name_kind(accelerator_type)
    return max(
        sum(count * each.get(resource, 0) for count, each in machines if kind in (None, *each))
        for machines in (there, may_come)
    )


def _limit(max_count: int) -> float:
    return math.inf if max_count < 0 else float(max_count)


def _name_kind(accelerator_type: str) -> str:
    """Return the resource that Ray gives to machines with a kind of GPU."""
    return f"accelerator_type:{accelerator_type}"


def count_actor_gpus(source: SourceSettings) -> float:
    """Return the GPUs of one actor of a source; by default a whole one if there can be any."""
    if source.gpus is not None:
        return source.gpus
    return 1.0 if count_reachable("GPU", source.accelerator_type) > 0 else 0.0


def list_bundles(source: SourceSettings) -> list[Bundle]:
    """Return what a source's first actors need of GPUs; nothing where it runs on CPUs."""
    gpus = count_actor_gpus(source)
    bundle: Bundle = {"GPU": gpus} if gpus else {}
    if gpus and source.accelerator_type is not None:
        bundle[_name_kind(source.accelerator_type)] = 0.001  # as Ray itself asks for a kind
    return [bundle] * source.min_actors if bundle else []


@contextmanager
def ask_ahead(groups: Sequence[Sequence[Bundle]]) -> Iterator[None]:
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
