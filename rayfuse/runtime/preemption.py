"""Watch for spot preemption and drain the node in Ray: `python -m rayfuse.runtime.preemption`.

Ray 2.60 asks no cloud, so that a spot machine would be lost without a word. When a node is drained
captures finish the shards in hand, training makes a checkpoint, and both go on elsewhere. This runs
beside `ray start` on each machine of AWS and Google Cloud, and ends with its node.
"""

# pyright: reportAttributeAccessIssue=false
# (compiled parts of Ray, which have no types)

import argparse
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import datetime
from http.client import HTTPException
from typing import Any

from ray._private.services import get_node_ip_address
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoRequest

METADATA_URL = "http://169.254.169.254"
"""Where a machine of either cloud asks about itself."""

LOOK_SECONDS = 3.0
"""Between two looks: Google gives notice of 30 seconds, Amazon of two minutes."""

GOOGLE_SECONDS = 25.0
"""Left once a notice of Google's is seen, which does not say until when."""

ANSWER_SECONDS = 5.0
HEAD_SECONDS = 60.0
"""For the metadata service to answer, and for the head: a node itself gives up then."""

_LOGGER = logging.getLogger("rayfuse.runtime.preemption")
# A proxy to the internet knows nothing of this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def poll_aws(url: str) -> float | None:
    """Return when Amazon takes this machine away, in Unix seconds; None without a notice.

    Raises:
        OSError, HTTPException, ValueError: The metadata service fails, or answers something else.
    """
    # A new token for each look: none to keep, none that expires.
    token = _fetch(f"{url}/latest/api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    name = f"{url}/latest/meta-data/spot/instance-action"
    try:
        answer = _fetch(name, "GET", {"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    match json.loads(answer):
        case {"time": str(told)}:
            return datetime.fromisoformat(told.replace("Z", "+00:00")).timestamp()
        case _:
            raise ValueError(f"{name} says {answer!r}, and no time")


def poll_gcp(url: str) -> float | None:
    """Return when Google takes this machine away, in Unix seconds; None without a notice.

    Raises:
        OSError, HTTPException, ValueError: As `poll_aws`.
    """
    name = f"{url}/computeMetadata/v1/instance/preempted"
    answer = _fetch(name, "GET", {"Metadata-Flavor": "Google"}).strip()
    if answer not in ("TRUE", "FALSE"):
        raise ValueError(f"{name} says {answer!r}, neither TRUE nor FALSE")
    return time.time() + GOOGLE_SECONDS if answer == "TRUE" else None


CLOUDS: dict[str, Callable[[str], float | None]] = {"aws": poll_aws, "gcp": poll_gcp}


def _fetch(url: str, method: str, headers: dict[str, str]) -> str:
    request = urllib.request.Request(url, headers=headers, method=method)
    with _OPENER.open(request, timeout=ANSWER_SECONDS) as answer:
        return answer.read().decode()


def find_node(gcs: GcsClient, ip_address: str) -> str | None:
    """Return the id of the node that lives at an address: of two, one is dead and not yet missed.

    Raises:
        RpcError: The head has not answered for a minute.
    """
    here = GetAllNodeInfoRequest.NodeSelector(node_ip_address=ip_address)
    nodes: dict[Any, Any] = gcs.get_all_node_info(timeout=HEAD_SECONDS, node_selectors=[here])
    alive = [node for node in nodes.values() if node.state == node.ALIVE]
    newest = max(alive, key=lambda node: node.start_time_ms, default=None)
    return None if newest is None else newest.node_id.hex()


def watch_for_preemption(
    ask: Callable[[], float | None], is_there: Callable[[], bool]
) -> float | None:
    """Return when this machine will be taken away, once that is known; None if its node is gone.

    A metadata service that fails is asked again; each new fault is logged.
    """
    fault = ""
    while is_there():
        try:
            deadline = ask()
            if deadline is not None:
                return deadline
        except (OSError, HTTPException, ValueError) as error:
            if fault != str(error):
                fault = str(error)
                _LOGGER.warning("the metadata service is asked again: %s", fault)
        time.sleep(LOOK_SECONDS)
    return None


def main() -> None:
    """Wait for the cloud's notice that it takes this machine away, and hand it on to Ray."""
    parser = argparse.ArgumentParser(
        prog="python -m rayfuse.runtime.preemption", description=main.__doc__
    )
    parser.add_argument("--cloud", required=True, choices=CLOUDS)
    parser.add_argument("--address", required=True, help="HOST:PORT, as `ray start` has it")
    parser.add_argument("--node-ip-address", help="as `ray start` has it, if it has one")
    parser.add_argument("--metadata-url", default=METADATA_URL)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    address = given.node_ip_address or get_node_ip_address(given.address)
    gcs = GcsClient(address=given.address)
    node = find_node(gcs, address)
    if node is None:
        parser.error(f"no node of {given.address} has the address {address}")
    _LOGGER.info("node %s at %s asks %s for a notice", node, address, given.cloud)
    deadline = watch_for_preemption(
        lambda: CLOUDS[given.cloud](given.metadata_url), lambda: find_node(gcs, address) == node
    )
    if deadline is None:
        _LOGGER.info("node %s is gone", node)
        return
    is_accepted, refusal = gcs.drain_node(
        node, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot", int(deadline * 1000)
    )
    if not is_accepted:
        parser.exit(1, f"Ray does not drain node {node}: {refusal}\n")
    _LOGGER.info("node %s goes in %.0f s: Ray was told", node, deadline - time.time())


if __name__ == "__main__":
    main()
