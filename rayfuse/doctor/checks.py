"""Facts -> findings. Pure functions of a recipe and a cluster's facts."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rayfuse.config.recipe import Recipe
from rayfuse.doctor.facts import NodeFacts
from rayfuse.runtime.autoscaler import HEAD, NodeKind
from rayfuse.runtime.memory import GIB, MEMORY

EVERYWHERE = ("0.0.0.0", "::")

MIN_SHM_BYTES = 2**28
"""Docker's default is 64 MiB, with which NCCL and PyTorch crash."""

MIN_TEMP_BYTES = 2.0 * GIB

MIN_HUB_BYTES = 20.0 * GIB
"""A 7B model in bfloat16 has 14 GB."""

SETTING_OF = {"temp": "TMPDIR", "HF_HOME": "HF_HOME"}
"""Environment variable that moves a folder to another disk, by the folder's purpose."""

ACCELERATOR = "accelerator_type:"


@dataclass(frozen=True)
class Finding:
    """A fault and its remedy."""

    check: str
    severity: Literal["error", "warning"]
    text: str
    remedy: str


@dataclass(frozen=True)
class ClusterFacts:
    """The facts of a cluster."""

    driver: NodeFacts
    """Of the node that runs the driver."""
    nodes: tuple[NodeFacts, ...]
    unresponsive: tuple[str, ...] = ()
    """Nodes on which the task failed or timed out."""
    resources: tuple[dict[str, float], ...] = ()
    """Of each node."""
    has_autoscaler: bool = False
    addable: tuple[NodeKind, ...] | None = None
    """Node types that the autoscaler may add; None if they are unknown."""
    checkpoint_bytes: float = 0.0
    """Of one checkpoint of the training."""
    actor_memory: Mapping[str, tuple[float, float]] = field(
        default_factory=dict[str, tuple[float, float]]
    )
    """Host memory of one actor, in bytes, on a CPU and on a GPU, by source; none where a model
    cannot be read."""


def list_findings(recipe: Recipe, cluster: ClusterFacts) -> list[Finding]:
    """Run every check, and list the findings, errors first."""
    found = [finding for check in CHECKS for finding in check(recipe, cluster)]
    return sorted(found, key=lambda finding: finding.severity != "error")


def check_nodes(recipe: Recipe, cluster: ClusterFacts) -> Iterator[Finding]:
    """Find nodes on which the task failed or timed out."""
    for node in cluster.unresponsive:
        yield Finding(
            "nodes",
            "error",
            f"{node} does not respond",
            "read its logs; remove it from the cluster, or restart it",
        )


def check_versions(recipe: Recipe, cluster: ClusterFacts) -> Iterator[Finding]:
    """Find packages of another version on a node than on the driver's."""
    for node in cluster.nodes:
        for package, ours in cluster.driver.versions.items():
            theirs = node.versions.get(package, "missing")
            if theirs != ours:
                yield Finding(
                    "versions",
                    "error",
                    f"{package} is {theirs} on {node.node} but {ours} here",
                    "use one image on all nodes, with pinned versions (constraints.txt)",
                )


def check_authentication(recipe: Recipe, cluster: ClusterFacts) -> Iterator[Finding]:
    """Find nodes and dashboards that accept connections without the token."""
    off = [node.node for node in cluster.nodes if not node.requires_token]
    if off:
        yield Finding(
            "authentication",
            "error",
            f"Ray demands no token on {_join(off)}: any client that reaches it can run code there",
            "set RAY_AUTH_MODE=token for `ray start` on every node, and for drivers and jobs",
        )
    for node in cluster.nodes:
        wide = [address for address in node.dashboard_addresses if address in EVERYWHERE]
        if wide and off:
            yield Finding(
                "dashboard",
                "error",
                f"the dashboard listens on {_join(wide)} of {node.node} and demands no token",
                "start the head with --dashboard-host=127.0.0.1 and reach it by ssh, or set "
                "RAY_AUTH_MODE=token",
            )


def check_token_files(recipe: Recipe, cluster: ClusterFacts) -> Iterator[Finding]:
    """Find token files that other users of a node can read."""
    seen: set[tuple[str, str]] = set()
    for node in (cluster.driver, *cluster.nodes):
        file, mode = node.token_file, node.token_file_mode
        if file is None or not mode & 0o077 or (node.node, file) in seen:
            continue
        seen.add((node.node, file))
        yield Finding(
            "token file",
            "error",
            f"{file} on {node.node} has mode {mode:04o}: other users of that node can read the "
            "cluster's token",
            f"chmod 600 {file}",
        )


def check_storage(recipe: Recipe, cluster: ClusterFacts) -> Iterator[Finding]:
    """Find nodes that cannot write shards to the storage, or see another storage."""
    for node in cluster.nodes:
        if node.storage_fault is not None:
            yield Finding(
                "storage",
                "error",
                f"from {node.node}: {node.storage_fault}",
                "allow that node's role to read, write and delete there, or use another store",
            )
        elif not node.sees_marker:
            yield Finding(
                "storage",
                "error",
                f"{node.node} does not see in {recipe.storage} a file that the driver wrote",
                "use an s3:// prefix, or a folder that every node mounts",
            )


def check_models(recipe: Recipe, cluster: ClusterFacts) -> Iterator[Finding]:
    """Find models that a node cannot read."""
    for node in cluster.nodes:
        for role, fault in node.model_faults.items():
            yield Finding(
                "models",
                "error",
                f"{role} cannot be read on {node.node}: {fault}",
                "put it in a folder that every node mounts, or give a hub id and give the nodes "
                "HF_TOKEN if it is gated",
            )


def check_disks(recipe: Recipe, cluster: ClusterFacts) -> Iterator[Finding]:
    """Find nodes with too little shared memory or disk space."""
    for node in cluster.nodes:
        shm, store = node.shm_bytes, node.resources.get("object_store_memory", 0.0)
        if shm is not None and shm < max(MIN_SHM_BYTES, store):
            yield Finding(
                "shared memory",
                "error" if shm < MIN_SHM_BYTES else "warning",
                f"/dev/shm has {shm / GIB:.2f} GiB on {node.node}, and the object store is "
                f"{store / GIB:.2f}: it spills to disk, or processes crash",
                "docker run --shm-size, or a memory emptyDir at /dev/shm",
            )
        for purpose, needed in compute_needed_bytes(recipe, cluster, node).items():
            free = node.free_bytes.get(purpose, needed)
            if free < needed:
                yield Finding(
                    "disk",
                    "error",
                    f"{free / GIB:.1f} GiB are free for {purpose} on {node.node}, of "
                    f"{needed / GIB:.1f} needed",
                    f"give the node a larger disk, or set {SETTING_OF[purpose]} to another one",
                )


def compute_needed_bytes(
    recipe: Recipe, cluster: ClusterFacts, node: NodeFacts
) -> dict[str, float]:
    """Compute the free disk space that a node needs, by purpose."""
    *_, training = list_requests(recipe, cluster)
    most = 1 if training.placement == "strict_spread" else recipe.train.num_workers
    workers = min(_count_on_node(training, node.resources), most)
    # Each worker leaves its share of a checkpoint there until it is uploaded.
    share = workers / recipe.train.num_workers
    needed = {"temp": MIN_TEMP_BYTES + cluster.checkpoint_bytes * share}
    models = (recipe.target, *recipe.run_sources)
    is_from_hub = any(not Path(model.model).expanduser().is_dir() for model in models)
    if is_from_hub and node.resources.get("CPU"):
        needed["HF_HOME"] = MIN_HUB_BYTES
    return needed


@dataclass(frozen=True)
class ResourceRequest:
    """The resources that one part of a recipe requests."""

    part: str
    """A source, or the training."""
    setting: str
    cpus: float
    """Of one actor or worker."""
    gpus: float
    count: int
    memory_bytes: float = 0.0
    accelerator_type: str | None = None
    placement: str = "spread"
    """As `train.placement`: if the actors or workers must share a node, or must not."""


def check_resources(recipe: Recipe, cluster: ClusterFacts) -> Iterator[Finding]:
    """Find requests that the cluster cannot satisfy, even after its autoscaler scaled up."""
    kinds = [NodeKind(resources, 1) for resources in cluster.resources]
    for request in list_requests(recipe, cluster):
        here = _count_fitting(request, kinds)
        if here >= request.count:
            continue
        # The maximum counts of `addable` include the nodes that are up, but not the head.
        head = [NodeKind(resources, 1) for resources in cluster.resources if HEAD in resources]
        ever = max(here, _count_fitting(request, (*(cluster.addable or ()), *head)))
        what = f"{request.part} needs {_describe(request)}; the cluster has room for {here:g} now"
        if ever >= request.count:
            continue  # the autoscaler will add the nodes
        if cluster.has_autoscaler and cluster.addable is None:
            yield Finding(
                "resources",
                "warning",
                f"{what}; the autoscaler may add the rest, but its node types cannot be read here",
                f"check that a worker group of the cluster has it, or change {request.setting}",
            )
        else:
            most = f", and for at most {ever:g} with the nodes that the autoscaler may add"
            yield Finding(
                "resources",
                "error",
                what + (most if cluster.has_autoscaler else ""),
                _name_remedy(request),
            )


def check_defaults(recipe: Recipe, cluster: ClusterFacts) -> Iterator[Finding]:
    """Find settings that would default to CPUs because the autoscaler's GPUs are unknown."""
    if _has_gpu(cluster.resources) or not cluster.has_autoscaler or cluster.addable is not None:
        return
    unset = [
        f"sources.{source.name}.gpus"
        for source in recipe.run_sources
        if source.gpus is None and source.accelerator_type is None
    ]
    if recipe.train.gpus_per_worker is None and recipe.train.accelerator_type is None:
        unset.append("train.gpus_per_worker")
    if unset:
        yield Finding(
            "resources",
            "warning",
            f"the cluster has no GPU yet, so the default of {_join(unset)} would be CPUs",
            f"set {' and '.join(f'{setting}=1' for setting in unset)}",
        )


def _has_gpu(nodes: Iterable[dict[str, float]]) -> bool:
    return any(resources.get("GPU", 0) > 0 for resources in nodes)


def list_requests(recipe: Recipe, cluster: ClusterFacts) -> Iterator[ResourceRequest]:
    """List the minimum resources of each source and of the training."""
    coming = [kind.resources for kind in cluster.addable or ()]
    has_gpu = _has_gpu([*cluster.resources, *coming])

    def count_gpus(given: float | None, accelerator_type: str | None) -> float:
        if given is not None:
            return given
        return 1.0 if has_gpu or accelerator_type is not None else 0.0  # the default of the stages

    for source in recipe.run_sources:
        gpus = count_gpus(source.gpus, source.accelerator_type)
        memory = cluster.actor_memory.get(source.name, (0.0, 0.0))
        yield ResourceRequest(
            f"source {source.name}",
            f"sources.{source.name}",
            source.cpus,
            gpus,
            source.min_actors,
            memory[1 if gpus else 0],
            source.accelerator_type,
        )
    train = recipe.train
    workers = train.min_workers or train.num_workers
    yield ResourceRequest(
        "training",
        "train.num_workers",
        train.cpus_per_worker,
        count_gpus(train.gpus_per_worker, train.accelerator_type),
        workers,
        accelerator_type=train.accelerator_type,
        placement=train.placement,
    )


def _count_fitting(request: ResourceRequest, kinds: Sequence[NodeKind]) -> float:
    """Count the actors that fit into the nodes under the placement."""
    rooms = [(_count_on_node(request, kind.resources), kind.max_count) for kind in kinds]
    if request.placement == "strict_pack":
        return float(max((room for room, most in rooms if most), default=0))
    if request.placement == "strict_spread":
        rooms = [(min(room, 1), most) for room, most in rooms]
    return float(sum(room * (math.inf if most < 0 else most) for room, most in rooms if room))


def _count_on_node(request: ResourceRequest, resources: dict[str, float]) -> int:
    """Count the actors that fit on one node."""
    kind = request.accelerator_type
    if kind is not None and f"{ACCELERATOR}{kind}" not in resources:
        return 0
    rooms = [resources.get("CPU", 0.0) / request.cpus]
    rooms += [resources.get("GPU", 0.0) / request.gpus] if request.gpus else []
    if request.memory_bytes and MEMORY in resources:  # else it is not requested: `find_room`
        rooms.append(resources[MEMORY] / request.memory_bytes)
    return int(min(rooms) + 1e-9)  # 0.3 / 0.1 is a little below 3


PLACEMENTS = {"strict_pack": " on one node", "strict_spread": ", each on its own node"}


def _describe(request: ResourceRequest) -> str:
    kind = f" of kind {request.accelerator_type}" if request.accelerator_type else ""
    gpus = f"{request.gpus:g} GPUs{kind} and " if request.gpus or kind else ""
    where = PLACEMENTS.get(request.placement, "")
    memory = request.memory_bytes / GIB
    host = f" and {memory:.1f} GiB of host memory" if memory else ""
    return f"{request.count} x {gpus}{request.cpus:g} CPUs{host}{where}"


def _name_remedy(request: ResourceRequest) -> str:
    kind = request.accelerator_type
    # Ray's actors request this resource; a node label of the same name adds no nodes.
    hint = f", with `{ACCELERATOR}{kind}: 1` in the node type's resources" if kind else ""
    less = ", lower its memory_gib" if request.memory_bytes else ""
    return f"add such nodes (max_workers{hint}){less}, or change {request.setting}"


def _join(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


CHECKS: tuple[Callable[[Recipe, ClusterFacts], Iterator[Finding]], ...] = (
    check_nodes,
    check_versions,
    check_authentication,
    check_token_files,
    check_storage,
    check_models,
    check_disks,
    check_resources,
    check_defaults,
)
