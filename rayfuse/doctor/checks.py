"""Facts -> findings. Pure: what a cluster has told is all that is looked at."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rayfuse.config.recipe import Recipe
from rayfuse.doctor.facts import NodeFacts
from rayfuse.runtime.autoscaler import HEAD, NodeKind

EVERYWHERE = ("0.0.0.0", "::")

GIB = 2**30

MIN_SHM_BYTES = 2**28
"""Docker gives 64 MiB, in which NCCL and PyTorch die."""

MIN_TEMP_BYTES = 2.0 * GIB

MIN_HUB_BYTES = 20.0 * GIB
"""A 7B model takes 14 GB."""

SETTING_OF = {"temp": "TMPDIR", "HF_HOME": "HF_HOME"}
"""What tells programs to use another disk."""

ACCELERATOR = "accelerator_type:"


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, and what helps."""

    check: str
    severity: Literal["error", "warning"]
    text: str
    remedy: str


@dataclass(frozen=True)
class ClusterFacts:
    """What is known of a cluster."""

    driver: NodeFacts
    """This machine's."""
    nodes: tuple[NodeFacts, ...]
    silent: tuple[str, ...] = ()
    """Nodes that did not answer."""
    resources: tuple[dict[str, float], ...] = ()
    """Of each node."""
    has_autoscaler: bool = False
    may_come: tuple[NodeKind, ...] | None = None
    """What the autoscaler may have; None where that cannot be read."""
    checkpoint_bytes: float = 0.0
    """Of the training."""


def list_findings(recipe: Recipe, cluster: ClusterFacts) -> list[Finding]:
    """Return all that is wrong, errors first."""
    found = [finding for check in CHECKS for finding in check(recipe, cluster)]
    return sorted(found, key=lambda finding: finding.severity != "error")


def check_answers(recipe: Recipe, cluster: ClusterFacts) -> Iterator[Finding]:
    """Yield the nodes that did not answer."""
    for node in cluster.silent:
        yield Finding(
            "nodes",
            "error",
            f"{node} has not answered",
            "look at its logs; take it out of the cluster, or start it anew",
        )


def check_versions(recipe: Recipe, cluster: ClusterFacts) -> Iterator[Finding]:
    """Yield the packages that a node has another version of than the driver."""
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
    """Yield what is open to whoever reaches the cluster."""
    off = [node.node for node in cluster.nodes if not node.asks_for_token]
    if off:
        yield Finding(
            "authentication",
            "error",
            f"Ray asks for no token on {_join(off)}: whoever reaches it can run code there",
            "set RAY_AUTH_MODE=token for `ray start` on every node, and for drivers and jobs",
        )
    for node in cluster.nodes:
        wide = [address for address in node.dashboard_addresses if address in EVERYWHERE]
        if wide and off:
            yield Finding(
                "dashboard",
                "error",
                f"the dashboard listens on {_join(wide)} of {node.node} and asks for no token",
                "start the head with --dashboard-host=127.0.0.1 and reach it by ssh, or set "
                "RAY_AUTH_MODE=token",
            )


def check_token_files(recipe: Recipe, cluster: ClusterFacts) -> Iterator[Finding]:
    """Yield the token files that others on a machine may read."""
    seen: set[tuple[str, str]] = set()
    for node in (cluster.driver, *cluster.nodes):
        file, mode = node.token_file, node.token_file_mode
        if file is None or not mode & 0o077 or (node.node, file) in seen:
            continue
        seen.add((node.node, file))
        yield Finding(
            "token file",
            "error",
            f"{file} on {node.node} has mode {mode:04o}: others on that machine can read the "
            "cluster's token",
            f"chmod 600 {file}",
        )


def check_storage(recipe: Recipe, cluster: ClusterFacts) -> Iterator[Finding]:
    """Yield the nodes that the storage does not serve as shards need it."""
    for node in cluster.nodes:
        if node.storage_fault is not None:
            yield Finding(
                "storage",
                "error",
                f"from {node.node}: {node.storage_fault}",
                "give that node's role leave to read, write and delete there, or use another store",
            )
        elif not node.sees_marker:
            yield Finding(
                "storage",
                "error",
                f"{node.node} does not see in {recipe.storage} what was written here",
                "use an s3:// prefix, or a folder that every machine mounts",
            )


def check_models(recipe: Recipe, cluster: ClusterFacts) -> Iterator[Finding]:
    """Yield the models that a node cannot read."""
    for node in cluster.nodes:
        for role, fault in node.model_faults.items():
            yield Finding(
                "models",
                "error",
                f"{role} cannot be read on {node.node}: {fault}",
                "put it on a folder that every machine mounts, or name a hub id and give the nodes "
                "HF_TOKEN if it is gated",
            )


def check_disks(recipe: Recipe, cluster: ClusterFacts) -> Iterator[Finding]:
    """Yield the nodes with too little shared memory or disk."""
    for node in cluster.nodes:
        shm, store = node.shm_bytes, node.resources.get("object_store_memory", 0.0)
        if shm is not None and shm < max(MIN_SHM_BYTES, store):
            yield Finding(
                "shared memory",
                "error" if shm < MIN_SHM_BYTES else "warning",
                f"/dev/shm has {shm / GIB:.2f} GiB on {node.node}, and the object store is "
                f"{store / GIB:.2f}: it goes to disk, or processes die",
                "docker run --shm-size, or a memory emptyDir at /dev/shm",
            )
        for purpose, least in needed_bytes(recipe, cluster, node).items():
            free = node.free_bytes.get(purpose, least)
            if free < least:
                yield Finding(
                    "disk",
                    "error",
                    f"{free / GIB:.1f} GiB are free for {purpose} on {node.node}, of "
                    f"{least / GIB:.1f} needed",
                    f"give the node a larger disk, or set {SETTING_OF[purpose]} to another one",
                )


def needed_bytes(recipe: Recipe, cluster: ClusterFacts, node: NodeFacts) -> dict[str, float]:
    """Return what must be free on a node, by what it is for."""
    *_, training = list_asks(recipe, cluster)
    most = 1 if training.placement == "strict_spread" else recipe.train.num_workers
    workers = min(_count_on_node(training, node.resources), most)
    # Each worker leaves its share of a checkpoint there until it is uploaded.
    share = workers / recipe.train.num_workers
    needed = {"temp": MIN_TEMP_BYTES + cluster.checkpoint_bytes * share}
    models = (recipe.target, *recipe.sources)
    is_from_hub = any(not Path(each.model).expanduser().is_dir() for each in models)
    if is_from_hub and node.resources.get("CPU"):
        needed["HF_HOME"] = MIN_HUB_BYTES
    return needed


@dataclass(frozen=True)
class Ask:
    """What a recipe asks a cluster for."""

    who: str
    setting: str
    cpus: float
    """Of one actor or worker."""
    gpus: float
    count: int
    accelerator_type: str | None = None
    placement: str = "spread"
    """As in `train.placement`: where the actors or workers must be beside one another, or apart."""


def check_resources(recipe: Recipe, cluster: ClusterFacts) -> Iterator[Finding]:
    """Yield what the recipe asks for and the cluster has not, nor may ever have."""
    kinds = [NodeKind(each, 1) for each in cluster.resources]
    for ask in list_asks(recipe, cluster):
        here = _count_places(ask, kinds)
        if here >= ask.count:
            continue
        # What may come counts those of its kind that are here, and leaves the head out.
        head = [NodeKind(each, 1) for each in cluster.resources if HEAD in each]
        ever = max(here, _count_places(ask, (*(cluster.may_come or ()), *head)))
        what = f"{ask.who} needs {_describe(ask)}; the cluster has room for {here:g} now"
        if ever >= ask.count:
            continue  # the autoscaler adds it as it is asked for
        if cluster.has_autoscaler and cluster.may_come is None:
            yield Finding(
                "resources",
                "warning",
                f"{what}; the rest may come, what the autoscaler can add is not to be read here",
                f"see that a worker group of the cluster has it, or change {ask.setting}",
            )
        else:
            most = f", and for {ever:g} at most with what the autoscaler may add"
            yield Finding(
                "resources",
                "error",
                what + (most if cluster.has_autoscaler else ""),
                _name_remedy(ask),
            )


def check_defaults(recipe: Recipe, cluster: ClusterFacts) -> Iterator[Finding]:
    """Yield what would run on CPUs because it is not to be read that GPUs may come."""
    if _has_gpu(cluster.resources) or not cluster.has_autoscaler or cluster.may_come is not None:
        return
    unset = [
        f"sources.{source.name}.gpus"
        for source in recipe.sources
        if source.gpus is None and source.accelerator_type is None
    ]
    if recipe.train.gpus_per_worker is None and recipe.train.accelerator_type is None:
        unset.append("train.gpus_per_worker")
    if unset:
        yield Finding(
            "resources",
            "warning",
            f"the cluster has no GPU yet, so what leaves {_join(unset)} to it would run on CPUs",
            f"set {' and '.join(f'{setting}=1' for setting in unset)}",
        )


def _has_gpu(nodes: Iterable[dict[str, float]]) -> bool:
    return any(resources.get("GPU", 0) > 0 for resources in nodes)


def list_asks(recipe: Recipe, cluster: ClusterFacts) -> Iterator[Ask]:
    """Yield what each source and the training cannot begin without."""
    coming = [kind.resources for kind in cluster.may_come or ()]
    has_gpu = _has_gpu([*cluster.resources, *coming])

    def count_gpus(given: float | None, accelerator_type: str | None) -> float:
        if given is not None:
            return given
        return 1.0 if has_gpu or accelerator_type is not None else 0.0  # as the stages see it

    for source in recipe.sources:
        yield Ask(
            f"source {source.name}",
            f"sources.{source.name}",
            source.cpus,
            count_gpus(source.gpus, source.accelerator_type),
            source.min_actors,
            source.accelerator_type,
        )
    train = recipe.train
    workers = train.min_workers or train.num_workers
    yield Ask(
        "training",
        "train.num_workers",
        train.cpus_per_worker,
        count_gpus(train.gpus_per_worker, train.accelerator_type),
        workers,
        train.accelerator_type,
        train.placement,
    )


def _count_places(ask: Ask, kinds: Sequence[NodeKind]) -> float:
    """Return how many actors fit, placed as they must be."""
    rooms = [(_count_on_node(ask, kind.resources), kind.most) for kind in kinds]
    if ask.placement == "strict_pack":
        return float(max((room for room, most in rooms if most), default=0))
    if ask.placement == "strict_spread":
        rooms = [(min(room, 1), most) for room, most in rooms]
    return float(sum(room * (math.inf if most < 0 else most) for room, most in rooms if room))


def _count_on_node(ask: Ask, resources: dict[str, float]) -> int:
    """Return how many actors fit on one node."""
    wanted = ask.accelerator_type
    if wanted is not None and f"{ACCELERATOR}{wanted}" not in resources:
        return 0
    rooms = [resources.get("CPU", 0.0) / ask.cpus]
    rooms += [resources.get("GPU", 0.0) / ask.gpus] if ask.gpus else []
    return int(min(rooms) + 1e-9)  # 1 / 0.1 is a little less than 10


PLACEMENTS = {"strict_pack": " on one node", "strict_spread": ", each on a node of its own"}


def _describe(ask: Ask) -> str:
    kind = f" of kind {ask.accelerator_type}" if ask.accelerator_type else ""
    gpus = f"{ask.gpus:g} GPUs{kind} and " if ask.gpus or kind else ""
    where = PLACEMENTS.get(ask.placement, "")
    return f"{ask.count} times {gpus}{ask.cpus:g} CPUs{where}"


def _name_remedy(ask: Ask) -> str:
    kind = ask.accelerator_type
    # Ray's actors ask for this resource; a label with the same name does not bring nodes up.
    hint = f", with `{ACCELERATOR}{kind}: 1` in the node type's resources" if kind else ""
    return f"add such nodes (max_workers{hint}), or change {ask.setting}"


def _join(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


CHECKS: tuple[Callable[[Recipe, ClusterFacts], Iterator[Finding]], ...] = (
    check_answers,
    check_versions,
    check_authentication,
    check_token_files,
    check_storage,
    check_models,
    check_disks,
    check_resources,
    check_defaults,
)
