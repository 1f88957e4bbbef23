"""Joining a Ray cluster, or starting one on this machine."""

import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from typing import Any

from rayfuse.config.base import UserError

MIN_LOCAL_CPUS = 4
"""Logical CPUs of a cluster on this machine at least: Ray Data stalls with fewer."""

KNOCK_SECONDS = 20.0
"""What the head of a cluster may take to listen."""

REFUSALS = ("Invalid address format", "Failed to connect to GCS")
"""How errors of Ray begin that are about the address."""


class ClusterError(UserError):
    """The cluster that RAY_ADDRESS names cannot be joined."""


def join_cluster() -> None:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine.

    A cluster of our own asks for a token that nobody else knows, and leaves no token file behind.

    Raises:
        ClusterError: RAY_ADDRESS names no cluster that can be joined.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address and "ray" not in sys.modules:  # ray reads these as it is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    if ray.is_initialized():
        return
    runtime_env = {
        "env_vars": worker_env(),
        "worker_process_setup_hook": "rayfuse.runtime.logging.set_up_worker_logs",
    }
    options: dict[str, Any] = {"log_to_driver": False, "runtime_env": runtime_env}
    if not address:
        options |= {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": max(os.cpu_count() or 1, MIN_LOCAL_CPUS),
        }
    options["logging_level"] = logging.WARNING
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if address:
        _join(address, options)
    else:
        ray.init(**options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own, which ends with code 15
    _quieten_ray_data()


def _join(address: str, options: dict[str, Any]) -> None:
    """Join the cluster that RAY_ADDRESS names, and say what to do where that fails."""
    import ray

    try:
        _wait_for_port(address)
        ray.init(**options)
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        is_vague = isinstance(error, ValueError | RuntimeError)
        if is_vague and not str(error).startswith(REFUSALS):
            raise  # it is about something else
        raise ClusterError(
            f"RAY_ADDRESS is {address!r}, a cluster that cannot be joined ({error}); see that its "
            "head runs and listens there (not its dashboard), and that RAY_AUTH_MODE and the token "
            "are the same on both sides, or unset RAY_ADDRESS to run on this machine alone"
        ) from error


def _wait_for_port(address: str) -> None:
    """Wait for somebody to listen, as a head that starts soon does; Ray itself waits for minutes.

    Raises:
        OSError: Nobody does.
        OverflowError: There is no such port.
    """
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:  # `auto`, ray://
        return
    until = time.monotonic() + KNOCK_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(1)
        else:
            return


def shutdown_now() -> None:
    """Leave the cluster while threads still work on it; what they say of that is not printed."""
    ray = sys.modules.get("ray")
    logging.disable(logging.CRITICAL)
    threading.excepthook = lambda _: None
    if ray is not None:
        ray.shutdown()


def find_root_cause(error: BaseException) -> BaseException:
    """Find what was raised inside Ray's wrappers."""
    if not type(error).__module__.startswith("ray."):
        return error
    inner = getattr(error, "cause", None) or error.__cause__
    for failure in getattr(error, "worker_failures", {}).values():
        inner = failure
    return find_root_cause(inner) if isinstance(inner, BaseException) else error


def on_driver_node() -> dict[str, Any]:
    """Return Ray's options for what must outlive all machines but the driver's."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    return {
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
    }


def _quieten_ray_data() -> None:
    """Leave progress to ours, which counts shards, and keep warnings and errors."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # else its message does not reach the driver
    from rayfuse.runtime.ray_internals import quiet_data_loggers

    quiet_data_loggers()


def worker_env() -> dict[str, str]:
    """Return the environment that workers need and do not inherit from the driver."""
    names = ("HF_HUB_OFFLINE", "HF_HOME", "DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    return kept | {
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
