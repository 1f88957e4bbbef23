"""Collect the facts of a cluster: a Ray task on each node, and the autoscaler's settings."""

import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayfuse.capture.actor_memory import estimate_actor_memory
from rayfuse.config.recipe import Recipe
from rayfuse.config.text import show_controls
from rayfuse.doctor.checks import ClusterFacts
from rayfuse.doctor.facts import (
    FactsRequest,
    NodeFacts,
    collect_facts,
    find_token_file,
    list_versions,
)
from rayfuse.plan.estimate import size_checkpoint
from rayfuse.plan.model_size import size_from_files
from rayfuse.runtime.autoscaler import HEAD
from rayfuse.runtime.ray_internals import find_dashboard_port, is_token_auth_enabled
from rayfuse.runtime.resources import read_autoscaler
from rayfuse.storage.store import open_store

TASK_TIMEOUT_SECONDS = 120.0
"""Timeout of a node's task; a new node first imports the packages."""


def collect_cluster_facts(recipe: Recipe, marker: str | None) -> ClusterFacts:
    """Collect the facts of the cluster that was joined.

    Args:
        recipe: The recipe that will run there.
        marker: A file that was written to its storage; None if that failed.
    """
    models = (("target", recipe.target), *((f"source {s.name}", s) for s in recipe.run_sources))
    request = FactsRequest(
        storage=open_store(recipe.storage).root,  # nodes have other working folders
        retry_seconds=recipe.storage_retry_seconds,
        marker=marker,
        models=models,
        dashboard_port=None,
    )
    alive: list[dict[str, Any]] = [node for node in ray.nodes() if node["Alive"]]
    pending = {_start_task(node, request): node for node in alive}
    ready, late = ray.wait(list(pending), num_returns=len(pending), timeout=TASK_TIMEOUT_SECONDS)
    for reference in late:
        ray.cancel(reference, force=True)
    facts_by_node = {
        id(pending[reference]): _fetch(reference, pending[reference]) for reference in ready
    }
    nodes = [found for node in alive if (found := facts_by_node.get(id(node))) is not None]
    has_autoscaler, addable = read_autoscaler()
    token_file, mode = find_token_file()
    own = ray.get_runtime_context().get_node_id()
    driver_node = _name(next(node for node in alive if node["NodeID"] == own))
    return ClusterFacts(
        driver=NodeFacts(driver_node, list_versions(), True, token_file, mode),
        nodes=tuple(nodes),
        unresponsive=tuple(_name(node) for node in alive if facts_by_node.get(id(node)) is None),
        resources=tuple(node["Resources"] for node in alive),
        has_autoscaler=has_autoscaler,
        addable=addable,
        checkpoint_bytes=_size_checkpoint(recipe),
        actor_memory=_size_actors(recipe),
    )


def _size_actors(recipe: Recipe) -> dict[str, tuple[float, float]]:
    """Estimate the memory of one actor of each source whose model can be read, on CPU and GPU."""
    sizes: dict[str, tuple[float, float]] = {}
    estimate = partial(estimate_actor_memory, shard_tokens=recipe.corpus.shard_tokens)
    for source in recipe.run_sources:
        with suppress(ValueError, OSError):
            on_cpu, on_gpu = (
                estimate(source, recipe.capture, on_gpu=on_gpu) for on_gpu in (False, True)
            )
            sizes[source.name] = (on_cpu, on_gpu)
    return sizes


def _size_checkpoint(recipe: Recipe) -> float:
    """Estimate the bytes of a checkpoint of the target; 0 if the model cannot be read.

    `check_models` reports a model that cannot be read.
    """
    try:
        size = size_from_files(recipe.target)
    except (ValueError, OSError):
        return 0.0
    return size_checkpoint(size, recipe.train, recipe.plan)


def _start_task(node: dict[str, Any], request: FactsRequest) -> Any:
    resources = node["Resources"]
    if not resources.get("CPU"):
        request = replace(request, models=())  # no model runs on a node without CPUs
    if HEAD in resources:
        request = replace(request, dashboard_port=find_dashboard_port())
    options: dict[str, Any] = {
        "num_cpus": 0,
        "max_retries": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
    }
    return ray.remote(**options)(collect_on_node).remote(request, _name(node))


def collect_on_node(request: FactsRequest, node: str) -> NodeFacts:
    """Collect the facts of the node that runs this task; Ray pickles the function by its name."""
    return collect_facts(request, node, requires_token=is_token_auth_enabled())


def _fetch(reference: Any, node: dict[str, Any]) -> NodeFacts | None:
    try:
        facts: NodeFacts = ray.get(reference)  # pyright: ignore[reportAssignmentType]
    except RayError as error:
        print(f"{_name(node)}: {show_controls(str(error))}", file=sys.stderr)
        return None
    return replace(facts, resources=node["Resources"])


def _name(node: dict[str, Any]) -> str:
    head = " (head)" if HEAD in node["Resources"] else ""
    return f"node {node['NodeManagerAddress']} {node['NodeID'][:8]}{head}"
