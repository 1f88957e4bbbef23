"""Watch for spot preemption and drain the node in Ray: `python -m rayfuse.runtime.preemption`.

Ray 2.60 does not poll the clouds for preemption notices, so a spot node would be lost without
warning. When a node is drained, captures finish their current shards, training writes a
checkpoint, and both resume on other nodes. This process runs beside `ray start` on each node of
AWS and Google Cloud, and exits with its node.
"""

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

from rayfuse.config.text import show_on_one_line
from rayfuse.runtime.ray_internals import (
    connect_gcs,
    drain_node,
    find_node_id,
    find_node_ip_address,
)

METADATA_URL = "http://169.254.169.254"
"""Address of the metadata service in both clouds."""

POLL_SECONDS = 3.0
"""Between two polls: Google gives notice of 30 seconds, Amazon of two minutes."""

GCP_NOTICE_SECONDS = 25.0
"""Time that is left when a poll sees Google's notice, which carries no deadline."""

REQUEST_TIMEOUT_SECONDS = 5.0
"""Timeout of a request to the metadata service."""

MAX_REPLY_BYTES = 65_536
"""A reply of the metadata service has some hundred bytes."""

MAX_LOG_CHARACTERS = 300

MAX_NOTICE_SECONDS, MAX_LATE_SECONDS = 3_600.0, 300.0
"""The time from a notice to its deadline, at most; and how late it may be seen."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        return None


_LOGGER = logging.getLogger("rayfuse.runtime.preemption")
# The metadata service is link-local: a proxy to the internet cannot reach it.
# A redirect would carry the token to another host: it is an error, as any other status.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)


def poll_aws(url: str) -> float | None:
    """Read the time at which Amazon reclaims this instance, in Unix seconds; None without a notice.

    Raises:
        OSError, HTTPException, ValueError: The metadata service fails or its reply is malformed.
        RecursionError: The reply is nested too deep.
    """
    # IMDSv2 needs a token. Fetching one for each poll means that none can expire.
    token = _fetch(f"{url}/latest/api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    name = f"{url}/latest/meta-data/spot/instance-action"
    try:
        reply = _fetch(name, "GET", {"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as error:
        if error.code == 404:  # no notice
            return None
        raise
    match json.loads(reply):
        case {"time": str(time_text)}:
            deadline = datetime.fromisoformat(time_text.replace("Z", "+00:00")).timestamp()
        case _:
            raise ValueError(f"{name} is {reply!r}, which has no time")
    if not -MAX_LATE_SECONDS <= deadline - time.time() <= MAX_NOTICE_SECONDS:
        raise ValueError(f"{name} is {reply!r}, which is no time of a notice now")
    return deadline


def poll_gcp(url: str) -> float | None:
    """Estimate when Google reclaims this instance, in Unix seconds; None without a notice.

    Raises:
        OSError, HTTPException, ValueError: The metadata service fails or its reply is malformed.
    """
    name = f"{url}/computeMetadata/v1/instance/preempted"
    reply = _fetch(name, "GET", {"Metadata-Flavor": "Google"}).strip()
    if reply not in ("TRUE", "FALSE"):
        raise ValueError(f"{name} is {reply!r}, neither TRUE nor FALSE")
    return time.time() + GCP_NOTICE_SECONDS if reply == "TRUE" else None


CLOUDS: dict[str, Callable[[str], float | None]] = {"aws": poll_aws, "gcp": poll_gcp}


def _fetch(url: str, method: str, headers: dict[str, str]) -> str:
    request = urllib.request.Request(url, headers=headers, method=method)
    with _OPENER.open(request, timeout=REQUEST_TIMEOUT_SECONDS) as reply:
        content = reply.read(MAX_REPLY_BYTES + 1)
    if len(content) > MAX_REPLY_BYTES:
        raise ValueError(f"{url} has more than {MAX_REPLY_BYTES:,} bytes")
    return content.decode()


def wait_for_notice(
    poll: Callable[[], float | None], is_node_alive: Callable[[], bool]
) -> float | None:
    """Poll until a preemption notice comes, and return its deadline in Unix seconds.

    A poll that fails is retried; each new error is logged once.

    Returns:
        None if the node died without a notice.
    """
    last_error = ""
    while is_node_alive():
        try:
            deadline = poll()
            if deadline is not None:
                return deadline
        except (OSError, HTTPException, ValueError, RecursionError) as error:
            if last_error != str(error):
                last_error = str(error)
                shown = show_on_one_line(last_error)[:MAX_LOG_CHARACTERS]
                _LOGGER.warning("metadata service failed, retrying: %s", shown)
        time.sleep(POLL_SECONDS)
    return None


def main() -> None:
    """Wait for the cloud's preemption notice for this node, then drain the node in Ray."""
    parser = argparse.ArgumentParser(
        prog="python -m rayfuse.runtime.preemption", description=main.__doc__
    )
    parser.add_argument("--cloud", required=True, choices=CLOUDS)
    parser.add_argument("--address", required=True, help="HOST:PORT, as given to `ray start`")
    parser.add_argument("--node-ip-address", help="as given to `ray start`, if it was")
    parser.add_argument("--metadata-url", default=METADATA_URL)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    ip_address = given.node_ip_address or find_node_ip_address(given.address)
    gcs = connect_gcs(given.address)
    node = find_node_id(gcs, ip_address)
    if node is None:
        parser.error(f"no live node of {given.address} has the address {ip_address}")
    _LOGGER.info("node %s at %s: polling %s for a preemption notice", node, ip_address, given.cloud)
    deadline = wait_for_notice(
        lambda: CLOUDS[given.cloud](given.metadata_url),
        lambda: find_node_id(gcs, ip_address) == node,
    )
    if deadline is None:
        _LOGGER.info("node %s is dead", node)
        return
    refusal = drain_node(gcs, node, deadline)
    if refusal is not None:
        parser.exit(1, f"Ray refused to drain node {node}: {refusal}\n")
    _LOGGER.info("node %s ends in %.0f s: draining", node, deadline - time.time())


if __name__ == "__main__":
    main()
