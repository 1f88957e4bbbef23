"""What a node tells of itself. Runs on every node of a cluster; imports no ray."""

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
from rayfuse.models.files import read_model_files
from rayfuse.storage.store import check_store, open_store

PACKAGES = ("ray", "torch", "transformers", "pyarrow")

SHM = "/dev/shm"

LISTENS = "0A"
"""The state of a listening socket in /proc/net/tcp."""


@dataclass(frozen=True)
class Questions:
    """What each node is asked."""

    storage: str
    retry_seconds: float
    marker: str | None
    """A file that the driver has put into the storage; None where it could not."""
    models: tuple[tuple[str, ModelSettings], ...]
    """By role."""
    dashboard_port: int | None
    """Where the dashboard listens, on the head."""


@dataclass(frozen=True)
class NodeFacts:
    """What a node has told."""

    node: str
    versions: dict[str, str]
    asks_for_token: bool
    """Ray's processes there want the cluster's token."""
    token_file: str | None = None
    """Where the token is read from, if from a file."""
    token_file_mode: int = 0o600
    storage_fault: str | None = None
    sees_marker: bool = True
    """It sees what the driver has put into the storage."""
    model_faults: dict[str, str] = field(default_factory=dict[str, str])
    """By role: why a model cannot be read there."""
    shm_bytes: int | None = None
    """Size of /dev/shm; None where there is none."""
    resources: dict[str, float] = field(default_factory=dict[str, float])
    """What Ray has there to give."""
    free_bytes: dict[str, int] = field(default_factory=dict[str, int])
    """On the disk, by what the folder is for."""
    dashboard_addresses: tuple[str, ...] = ()
    """That the dashboard's port listens on there."""


def collect_facts(questions: Questions, node: str, *, asks_for_token: bool) -> NodeFacts:
    """Return what this node has to tell."""
    token_file, mode = find_token_file()
    storage_fault, sees_marker = try_storage(questions)
    port = questions.dashboard_port
    return NodeFacts(
        node=node,
        versions=list_versions(),
        asks_for_token=asks_for_token,
        token_file=token_file,
        token_file_mode=mode,
        storage_fault=storage_fault,
        sees_marker=sees_marker,
        model_faults=try_models(questions.models),
        shm_bytes=shutil.disk_usage(SHM).total if Path(SHM).is_dir() else None,
        free_bytes={
            "temp": _free_bytes(Path(tempfile.gettempdir())),
            "HF_HOME": _free_bytes(find_hub_folder()),
        },
        dashboard_addresses=() if port is None else list_listeners(port),
    )


def list_versions() -> dict[str, str]:
    """Return the versions that must be equal on all nodes."""
    versions = {"python": platform.python_version(), "rayfuse": rayfuse.__version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    return versions


def find_token_file() -> tuple[str | None, int]:
    """Return the file that Ray reads its token from, and its mode; None where it reads none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None, 0
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return str(path), path.stat().st_mode & 0o777
    except OSError:
        return None, 0


def try_storage(questions: Questions) -> tuple[str | None, bool]:
    """Return why shards cannot be kept in the storage, and whether the marker is seen in it."""
    try:
        store = open_store(questions.storage, questions.retry_seconds)
        check_store(store)
    except ValueError as error:
        return str(error), False
    if questions.marker is None:
        return None, True
    folder, _, name = questions.marker.rpartition("/")
    return None, name in store.sizes(folder)


def try_models(models: tuple[tuple[str, ModelSettings], ...]) -> dict[str, str]:
    """Return why models cannot be read here, by role; nothing for those that can.

    Of one that lies in a folder its files are opened, of one of the hub its config is fetched.
    """
    faults: dict[str, str] = {}
    for role, settings in models:
        try:
            _try_model(settings)
        except (ValueError, OSError) as error:
            faults[role] = str(error)
    return faults


def _try_model(settings: ModelSettings) -> None:
    folder = Path(settings.model).expanduser()
    if not folder.is_dir():
        read_model_files(settings.model, settings.revision)
        return
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder} has no *.safetensors")
    for file in (folder / "config.json", *weights):
        with open(file, "rb") as opened:
            opened.read(8)


def list_listeners(port: int) -> tuple[str, ...]:
    """Return the addresses that a port listens on here, such as 127.0.0.1 or 0.0.0.0."""
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
    """Return where models of the hub are kept."""
    return Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()


def _free_bytes(folder: Path) -> int:
    """Return what is free on a folder's disk, be it there yet or not."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
