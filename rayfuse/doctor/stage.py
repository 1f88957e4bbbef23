"""Asking a cluster: every node by a task that is tied to it, the autoscaler by its settings."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import yaml
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.state import state as cluster_state  # no public way to what may come
from ray._private.worker import get_dashboard_url
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayfuse.doctor.checks import ClusterFacts, NodeKind
from rayfuse.doctor.facts import NodeFacts, Questions, collect_facts
from rayfuse.recipe import Recipe

ANSWER_SECONDS = 120.0
"""For a node to answer; on a new one packages are imported first."""

HEAD = "node:__internal_head__"


def ask_cluster(recipe: Recipe, marker: str) -> ClusterFacts:
    """Return what the cluster that was joined tells.

    Args:
        recipe: What is to run there.
        marker: A file that was put into its storage.
    """
    models = (("target", recipe.target), *((f"source {s.name}", s) for s in recipe.sources))
    questions = Questions(
        storage=recipe.storage,
        patience_seconds=recipe.storage_patience_seconds,
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
    has_autoscaler, may_come = read_autoscaler(alive)
    driver = collect_facts(
        replace(questions, models=()), _name(_own_node(alive)), asks_for_token=True
    )
    return ClusterFacts(
        driver=driver,
        nodes=tuple(nodes),
        silent=tuple(_name(node) for node in alive if answers.get(id(node)) is None),
        resources=tuple(node["Resources"] for node in alive),
        has_autoscaler=has_autoscaler,
        may_come=may_come,
    )


def _ask_node(node: dict[str, Any], questions: Questions) -> Any:
    resources = node["Resources"]
    if not resources.get("CPU"):
        questions = replace(questions, models=())  # no model runs there
    if HEAD in resources:
        port = (get_dashboard_url() or "").rpartition(":")[2]
        questions = replace(questions, dashboard_port=int(port) if port.isdigit() else None)
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
    return replace(facts, object_store_bytes=node["Resources"].get("object_store_memory", 0.0))


def _name(node: dict[str, Any]) -> str:
    head = " (head)" if HEAD in node["Resources"] else ""
    return f"node {node['NodeManagerAddress']} {node['NodeID'][:8]}{head}"


def _own_node(alive: list[dict[str, Any]]) -> dict[str, Any]:
    own = ray.get_runtime_context().get_node_id()
    return next(node for node in alive if node["NodeID"] == own)


def read_autoscaler(alive: list[dict[str, Any]]) -> tuple[bool, tuple[NodeKind, ...] | None]:
    """Return whether the cluster grows by itself, and what may come, as far as it can be read."""
    config = cluster_state.get_cluster_config()
    if config is not None and config.node_group_configs:
        kinds = [
            NodeKind({k: float(v) for k, v in group.resources.items()}, group.max_count)
            for group in config.node_group_configs
        ]
        return True, tuple(kinds)
    head = next((node for node in alive if HEAD in node["Resources"]), alive[0])
    options: dict[str, Any] = {
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(head["NodeID"], soft=False),
    }
    gcs = ray.get_runtime_context().gcs_address
    text = ray.get(ray.remote(**options)(find_autoscaling_config).remote(gcs))
    if text:
        return True, read_node_kinds(text)
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return bool(is_autoscaler_v2()), None


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
