"""Collect the facts of one node. Runs on every node of a cluster; imports no ray."""

import os
import platform
import shutil
import socket
import struct
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import rayfuse
from rayfuse.config.models import ModelSettings
from rayfuse.models.adapter import check_peft, read_adapter
from rayfuse.models.config_file import find_config, read_config
from rayfuse.models.weight_files import list_weight_files
from rayfuse.storage.store import check_store, open_store

PACKAGES = ("ray", "torch", "transformers", "pyarrow")

SHM = "/dev/shm"

LISTENS = "0A"
"""State of a listening socket in /proc/net/tcp."""


@dataclass(frozen=True)
class FactsRequest:
    """What each node checks."""

    storage: str
    retry_seconds: float
    marker: str | None
    """A file that the driver wrote to the storage; None if that failed."""
    models: tuple[tuple[str, ModelSettings], ...]
    """By role."""
    dashboard_port: int | None
    """Port of the dashboard, for the head node only."""


@dataclass(frozen=True)
class NodeFacts:
    """The facts of one node."""

    node: str
    versions: dict[str, str]
    requires_token: bool
    """Ray's processes on the node demand the cluster's token."""
    token_file: str | None = None
    """File of the token; None if it comes from the environment."""
    token_file_mode: int = 0o600
    storage_fault: str | None = None
    sees_marker: bool = True
    """The node sees the file that the driver wrote to the storage."""
    model_faults: dict[str, str] = field(default_factory=dict[str, str])
    """Errors of the models that the node cannot read, by role."""
    shm_bytes: int | None = None
    """Size of /dev/shm; None if it does not exist."""
    resources: dict[str, float] = field(default_factory=dict[str, float])
    """Ray's resources on the node."""
    free_bytes: dict[str, int] = field(default_factory=dict[str, int])
    """Free disk space, by the purpose of the folder."""
    dashboard_addresses: tuple[str, ...] = ()
    """Addresses on which the dashboard's port listens."""


def collect_facts(request: FactsRequest, node: str, *, requires_token: bool) -> NodeFacts:
    """Collect the facts of this node."""
    token_file, mode = find_token_file()
    storage_fault, sees_marker = check_storage(request)
    port = request.dashboard_port
    return NodeFacts(
        node=node,
        versions=list_versions(),
        requires_token=requires_token,
        token_file=token_file,
        token_file_mode=mode,
        storage_fault=storage_fault,
        sees_marker=sees_marker,
        model_faults=check_models(request.models),
        shm_bytes=shutil.disk_usage(SHM).total if Path(SHM).is_dir() else None,
        free_bytes={
            "temp": _free_bytes(Path(tempfile.gettempdir())),
            "HF_HOME": _free_bytes(find_hub_folder()),
        },
        dashboard_addresses=() if port is None else list_listeners(port),
    )


def list_versions() -> dict[str, str]:
    """List the package versions that must be equal on all nodes."""
    versions = {"python": platform.python_version(), "rayfuse": rayfuse.__version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    return versions


def find_token_file() -> tuple[str | None, int]:
    """Find the file that Ray reads its token from, and its mode; None if it reads none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None, 0
    name = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    path = Path(os.path.expanduser(name))
    try:
        return str(path), path.stat().st_mode & 0o777
    except OSError:
        return None, 0


def check_storage(request: FactsRequest) -> tuple[str | None, bool]:
    """Write to the storage and look for the marker; return the error, and True if it was found."""
    try:
        store = open_store(request.storage, request.retry_seconds)
        check_store(store)
    except ValueError as error:
        return str(error), False
    if request.marker is None:
        return None, True
    try:
        store.read(request.marker)
    except FileNotFoundError:
        return None, False
    return None, True


def check_models(models: tuple[tuple[str, ModelSettings], ...]) -> dict[str, str]:
    """Try to read each model on this node, and return the errors by role.

    For a local folder the first bytes of each file are read, for a hub model its config is fetched.
    """
    faults: dict[str, str] = {}
    for role, settings in models:
        try:
            _check_model(settings)
        except (ValueError, OSError) as error:
            faults[role] = str(error)
    return faults


def _check_model(settings: ModelSettings) -> None:
    adapter = read_adapter(settings)
    if adapter is not None:
        check_peft()
        with open(adapter.weights, "rb") as opened:
            opened.read(8)
    folder = Path(settings.model).expanduser()
    if not folder.is_dir():
        read_config(settings)
        return
    for file in (find_config(settings.model, settings.revision), *list_weight_files(folder)):
        with open(file, "rb") as opened:
            opened.read(8)


def list_listeners(port: int) -> tuple[str, ...]:
    """List the addresses on which a port listens here, such as 127.0.0.1 or 0.0.0.0."""
    found: set[str] = set()
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        table = Path("/proc/net", name)
        for line in table.read_text().splitlines()[1:] if table.is_file() else []:
            _, local, _, state, *_ = line.split()
            address, _, hex_port = local.partition(":")
            if state == LISTENS and int(hex_port, 16) == port:
                words = [int(address[at : at + 8], 16) for at in range(0, len(address), 8)]
                found.add(socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words)))
    return tuple(sorted(found))


def find_hub_folder() -> Path:
    """Find the cache folder of hub models."""
    return Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()


def _free_bytes(folder: Path) -> int:
    """Measure the free space of a folder's disk; the folder need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
