"""Asking a cluster: every node by a task that is tied to it, the autoscaler by its settings."""

import sys
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayfuse.config.recipe import Recipe
from rayfuse.doctor.checks import ClusterFacts
from rayfuse.doctor.facts import (
    NodeFacts,
    Questions,
    collect_facts,
    find_token_file,
    list_versions,
)
from rayfuse.plan.estimate import size_checkpoint
from rayfuse.plan.model_size import size_from_files
from rayfuse.runtime.autoscaler import HEAD
from rayfuse.runtime.ray_internals import find_dashboard_port, is_token_auth_enabled
from rayfuse.runtime.resources import read_autoscaler

ANSWER_SECONDS = 120.0
"""For a node to answer; on a new one packages are imported first."""


def ask_cluster(recipe: Recipe, marker: str | None) -> ClusterFacts:
    """Return what the cluster that was joined tells.

    Args:
        recipe: What is to run there.
        marker: A file that was put into its storage; None where that failed.
    """
    models = (("target", recipe.target), *((f"source {s.name}", s) for s in recipe.sources))
    questions = Questions(
        storage=recipe.storage,
        retry_seconds=recipe.storage_retry_seconds,
        marker=marker,
        models=models,
        dashboard_port=None,
    )
    alive: list[dict[str, Any]] = [node for node in ray.nodes() if node["Alive"]]
    pending = {_ask_node(node, questions): node for node in alive}
    ready, late = ray.wait(list(pending), num_returns=len(pending), timeout=ANSWER_SECONDS)
    for each in late:
        ray.cancel(each, force=True)
    answers = {id(pending[each]): _fetch(each, pending[each]) for each in ready}
    nodes = [found for node in alive if (found := answers.get(id(node))) is not None]
    has_autoscaler, may_come = read_autoscaler()
    token_file, mode = find_token_file()
    own = ray.get_runtime_context().get_node_id()
    driver_node = _name(next(node for node in alive if node["NodeID"] == own))
    return ClusterFacts(
        driver=NodeFacts(driver_node, list_versions(), True, token_file, mode),
        nodes=tuple(nodes),
        silent=tuple(_name(node) for node in alive if answers.get(id(node)) is None),
        resources=tuple(node["Resources"] for node in alive),
        has_autoscaler=has_autoscaler,
        may_come=may_come,
        checkpoint_bytes=_size_checkpoint(recipe),
    )


def _size_checkpoint(recipe: Recipe) -> float:
    """Return the bytes of a checkpoint of the target; none if it cannot be read, which is found."""
    try:
        size = size_from_files(recipe.target)
    except (ValueError, OSError):
        return 0.0
    return size_checkpoint(size, recipe.train, recipe.plan)


def _ask_node(node: dict[str, Any], questions: Questions) -> Any:
    resources = node["Resources"]
    if not resources.get("CPU"):
        questions = replace(questions, models=())  # no model runs there
    if HEAD in resources:
        questions = replace(questions, dashboard_port=find_dashboard_port())
    options: dict[str, Any] = {
        "num_cpus": 0,
        "max_retries": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
    }
    return ray.remote(**options)(answer).remote(questions, _name(node))


def answer(questions: Questions, node: str) -> NodeFacts:
    """Return a node's facts; run by Ray, which finds the function by this name."""
    return collect_facts(questions, node, asks_for_token=is_token_auth_enabled())


def _fetch(reference: Any, node: dict[str, Any]) -> NodeFacts | None:
    try:
        facts: NodeFacts = ray.get(reference)  # pyright: ignore[reportAssignmentType]
    except RayError as error:
        print(f"{_name(node)}: {error}", file=sys.stderr)
        return None
    return replace(facts, resources=node["Resources"])


def _name(node: dict[str, Any]) -> str:
    head = " (head)" if HEAD in node["Resources"] else ""
    return f"node {node['NodeManagerAddress']} {node['NodeID'][:8]}{head}"
