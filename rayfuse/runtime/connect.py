"""Join a Ray cluster, or start one on this machine."""

import errno
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from rayfuse.config.base import UserError
from rayfuse.runtime.environment import open_cluster_folder, prepare_own_cluster
from rayfuse.runtime.worker_setup import DRIVER_FOLDER

MIN_LOCAL_CPUS = 4
"""Minimum of logical CPUs of a cluster on this machine: Ray Data stalls with fewer."""

PORT_TIMEOUT_SECONDS = 20.0
"""Time for the head of a cluster to accept connections, which may just be starting."""

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""In the environment of a driver that `ray job submit` started."""

ADDRESS_ERRORS = ("Invalid address format", "Failed to connect to GCS")
"""Beginnings of Ray's error messages about a wrong address."""

VERSION_ERROR = "Version mismatch: "
"""Begins Ray's error message about other versions of Ray or Python in the cluster."""

FULL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT)

RETRY_ADVICE = "\nFailed to apply UDF transform after "
"""Begins what Ray Data appends to the message of a task's error, once for each task."""


class ClusterError(UserError):
    """The cluster that RAY_ADDRESS names cannot be joined."""


def join_cluster() -> None:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine.

    A cluster started here is private: see `prepare_own_cluster`, which the command calls before any
    library can import ray, and `open_cluster_folder`.

    Raises:
        ClusterError: RAY_ADDRESS names no cluster that can be joined.
        UserError: The folder of temporary files cannot be used.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        prepare_own_cluster()
    logging.getLogger("ray.widgets.util").setLevel(logging.WARNING)  # advice in notebooks
    import ray

    if ray.is_initialized():
        return
    runtime_env = {
        "env_vars": worker_env(),
        "worker_process_setup_hook": "rayfuse.runtime.worker_setup.set_up_worker",
    }
    options: dict[str, Any] = {"log_to_driver": False, "runtime_env": runtime_env}
    if not address:
        options |= {
            "address": "local",
            "include_dashboard": False,
            "_temp_dir": str(open_cluster_folder()),
            "num_cpus": max(os.cpu_count() or 1, MIN_LOCAL_CPUS),
        }
    options["logging_level"] = logging.WARNING
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if address:
        _join(ray.init, address, options)
    else:
        ray.init(**options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(
            signal.SIGTERM, on_sigterm
        )  # undo Ray's own handler, which exits with code 15
    _quiet_ray_data()


def _join(init: Callable[..., Any], address: str, options: dict[str, Any]) -> None:
    """Join the cluster that RAY_ADDRESS names.

    Raises:
        ClusterError: It cannot be joined; the message has the remedy.
    """
    try:
        _wait_for_port(address)
        init(**options)
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        if str(error).startswith(VERSION_ERROR):
            found = " ".join(str(error).removeprefix(VERSION_ERROR).split())
            raise ClusterError(
                f"RAY_ADDRESS is {address!r}, a cluster with other versions ({found}); install the "
                "cluster's versions here, or run the command there with `ray job submit`"
            ) from error
        may_be_unrelated = isinstance(error, ValueError | RuntimeError)
        if may_be_unrelated and not str(error).startswith(ADDRESS_ERRORS):
            raise
        raise ClusterError(
            f"RAY_ADDRESS is {address!r}, a cluster that cannot be joined ({error}); see that its "
            "head runs and listens there (not its dashboard), and that RAY_AUTH_MODE and the token "
            "are the same on both sides, or unset RAY_ADDRESS to run on this machine alone"
        ) from error


def _wait_for_port(address: str) -> None:
    """Wait until the head accepts connections; Ray itself would wait for minutes.

    Raises:
        OSError: The port is closed after the timeout.
        OverflowError: The port is no valid number.
    """
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:  # `auto`, ray://
        return
    endpoint = (host.strip("[]"), int(port))
    until = time.monotonic() + PORT_TIMEOUT_SECONDS
    while True:
        try:
            socket.create_connection(endpoint, timeout=PORT_TIMEOUT_SECONDS).close()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(1)
        else:
            return


def shutdown_now() -> None:
    """Leave the cluster while threads still use it, without printing the errors that they raise."""
    ray = sys.modules.get("ray")
    logging.disable(logging.CRITICAL)
    threading.excepthook = lambda _: None
    if ray is not None:
        ray.shutdown()


def find_root_cause(error: BaseException) -> BaseException:
    """Find the error that Ray's wrappers contain."""
    if not type(error).__module__.startswith("ray."):
        return error
    inner = getattr(error, "cause", None) or error.__cause__
    for failure in getattr(error, "worker_failures", {}).values():
        inner = failure
    return find_root_cause(inner) if isinstance(inner, BaseException) else error


def describe_error(error: BaseException) -> str:
    """Return an error's message without the advice on retries that Ray Data appends to it.

    The message of a full disk gets its remedy.
    """
    message = str(error).partition(RETRY_ADVICE)[0]
    return f"{message}; free space there, then resume" if is_disk_full(error) else message


def is_disk_full(error: BaseException) -> bool:
    """Check whether an error is that of a disk without space, or of a used-up quota."""
    return isinstance(error, OSError) and error.errno in FULL_DISK_ERRNOS


def _quiet_ray_data() -> None:
    """Disable Ray Data's progress bars, as rayfuse counts shards; keep its warnings and errors."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # They advise to set `memory` of our own calls; users have sources[].memory_gib.
    context.issue_detectors_config.detectors = []
    context.raise_original_map_exception = True  # else its message does not reach the driver
    from rayfuse.runtime.ray_internals import drop_startup_warning, quiet_data_loggers

    quiet_data_loggers()
    drop_startup_warning()


def worker_env() -> dict[str, str]:
    """Return the environment variables that workers need but do not inherit from the driver."""
    names = ("HF_HUB_OFFLINE", "HF_HOME", "DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    if JOB_CONFIG not in os.environ:  # else the job's own copy of this folder is the workers'
        kept[DRIVER_FOLDER] = os.getcwd()
    if not os.environ.get("RAY_ADDRESS") and sys.platform == "linux":
        kept["GLOO_SOCKET_IFNAME"] = "lo"  # the collectives of a training ask for no token
    return kept | {
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
