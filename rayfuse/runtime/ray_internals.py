"""Call the private Ray APIs that rayfuse depends on; no other module does.

Each function states which missing public API forces it. Check them all when Ray is upgraded: they
are written for Ray 2.60, which pyproject.toml pins for this reason.
"""

# pyright: reportAttributeAccessIssue=false
# (compiled parts of Ray, which have no types)

import functools
import logging
from typing import Any

from ray._private import worker
from ray._private.authentication.authentication_utils import (
    is_token_auth_enabled as _is_token_auth_enabled,
)
from ray._private.services import get_node_ip_address
from ray._private.state import state
from ray._private.worker import get_dashboard_url
from ray._raylet import GcsClient
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoRequest

GCS_TIMEOUT_SECONDS = 60.0
"""Timeout of a request to the GCS (the head's control service); a Ray node itself exits after it.
"""

_OPERATOR_LOGGER = "ray.data._internal.execution.operators.map_operator"
_PROGRESS_LOGGER = "ray.data._internal.progress"
_EXCEPTION_LOGGER = "ray.data.exceptions"
_EXECUTOR_LOGGER = "ray.data._internal.execution.streaming_executor_state"
_STARTUP_WARNING = "worker processes have been started on node"
_TASK_ERROR = "An exception was raised from a task"


def read_node_groups() -> list[tuple[dict[str, float], int]] | None:
    """Read the resources and the maximum count of each node type that the autoscaler may add.

    `ray.nodes()` and `ray.cluster_resources()` know only the nodes that are up; there is no public
    API for those that may come, and a cluster that scales from zero has none up.

    Returns:
        None where no autoscaler has reported its settings. A count of -1 is unlimited.
    """
    config = state.get_cluster_config()
    if config is None or not config.node_group_configs:
        return None
    return [
        ({name: float(amount) for name, amount in group.resources.items()}, group.max_count)
        for group in config.node_group_configs
    ]


def has_autoscaler_v2() -> bool:
    """Detect an autoscaler of version 2, as KubeRay runs it.

    Its settings are in no file of the head, and no public API reports that it exists.
    """
    return bool(is_autoscaler_v2())


def list_draining_nodes() -> dict[str, int]:
    """Map the id of each draining node to its deadline, in Unix milliseconds.

    Ray Data stops giving work to actors on a draining node but keeps them there, and neither the
    actor nor `ray.nodes()` shows the state (`ray.util.state.list_nodes` neither, in 2.60).
    """
    draining: dict[str, int] = state.get_draining_nodes()
    return draining


def find_dashboard_port() -> int | None:
    """Find the port of the dashboard; None where it does not run.

    `ray.init` returns the address in the process that called it, but no public API finds it later.
    """
    port = (get_dashboard_url() or "").rpartition(":")[2]
    return int(port) if port.isdigit() else None


def is_token_auth_enabled() -> bool:
    """Check whether the Ray processes of this node demand the cluster's token.

    The setting comes from the environment of `ray start`, and no public API reports it.
    """
    return bool(_is_token_auth_enabled())


def find_node_ip_address(gcs_address: str) -> str:
    """Find the IP address under which `ray start` registers this node at a cluster.

    `ray.util.get_node_ip_address` needs a driver's connection, and a watcher beside `ray start`
    must not be a driver: Ray keeps a job open for each.
    """
    address: str = get_node_ip_address(gcs_address)
    return address


def connect_gcs(gcs_address: str) -> Any:
    """Connect to the GCS of a cluster without becoming a driver (see `find_node_ip_address`)."""
    return GcsClient(address=gcs_address)


def find_node_id(gcs: Any, ip_address: str) -> str | None:
    """Find the id of the node that is alive at an address; None if there is none.

    If two nodes are alive there, the older is dead and its heartbeat has not timed out yet. The
    public `ray.nodes()` needs a driver's connection.

    Args:
        gcs: A connection of `connect_gcs`.
        ip_address: As the node registered it.

    Raises:
        RpcError: The head has not answered for `GCS_TIMEOUT_SECONDS`.
    """
    selector = GetAllNodeInfoRequest.NodeSelector(node_ip_address=ip_address)
    nodes: dict[Any, Any] = gcs.get_all_node_info(
        timeout=GCS_TIMEOUT_SECONDS, node_selectors=[selector]
    )
    alive = [node for node in nodes.values() if node.state == node.ALIVE]
    newest = max(alive, key=lambda node: node.start_time_ms, default=None)
    return None if newest is None else newest.node_id.hex()


def drain_node(gcs: Any, node_id: str, deadline_seconds: float) -> str | None:
    """Drain a node that will be preempted, and return why Ray refused; None if it accepted.

    Only the command `ray drain-node` is public; it starts a process and gives the deadline in
    seconds from its own start.

    Args:
        gcs: A connection of `connect_gcs`.
        node_id: As `find_node_id` returned it.
        deadline_seconds: When the node goes down, in Unix seconds.
    """
    is_accepted, refusal = gcs.drain_node(
        node_id,
        DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
        "spot",
        int(deadline_seconds * 1000),
    )
    return None if is_accepted else str(refusal)


def drop_startup_warning() -> None:
    """Drop Ray's warning of many worker processes, which pools of actors start on purpose.

    It is printed on stdout as a message of the raylet; no public option silences it.
    """
    original = worker.print_to_stdstream
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def print_others(data: dict[str, Any], *args: Any, **options: Any) -> None:
        if not any(_STARTUP_WARNING in line for line in data.get("lines", ())):
            original(data, *args, **options)

    worker.print_to_stdstream = print_others


def quiet_data_loggers() -> None:
    """Silence what Ray Data warns about settings we intend, and its tracebacks.

    No public option does it. Two loggers warn that progress bars are disabled, and about each actor
    that asks for a GPU and for CPUs, as every capture actor does. Two print a hundred lines for an
    error of a task, which the driver raises and prints as one message.
    """
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger(_PROGRESS_LOGGER).setLevel(logging.ERROR)
    logging.getLogger(_EXCEPTION_LOGGER).setLevel(logging.CRITICAL)
    logging.getLogger(_EXECUTOR_LOGGER).addFilter(
        lambda record: not record.getMessage().startswith(_TASK_ERROR)
    )
    logging.getLogger(_OPERATOR_LOGGER).addFilter(
        lambda record: "num_cpus and num_gpus" not in record.getMessage()
    )
