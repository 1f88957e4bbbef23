"""What tests share: one small Ray cluster per session, real data where it is."""

import os
import secrets
import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3 import FaultProxy, MotoServer, make_bucket, s3_environment

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TESTS = Path(__file__).parent
OWN_MACHINES = ("chaos", "cluster", "train/test_kills.py", "docs/test_notebook.py")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.hookimpl(tryfirst=True)  # before the groups are read
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests with a cluster in two processes, the others run beside them meanwhile: those that
    share the session's, and those that start machines of their own, and mostly wait for them.
    """
    for item in items:
        if item.get_closest_marker("ray"):
            is_own = any(item.path.is_relative_to(TESTS / each) for each in OWN_MACHINES)
            item.add_marker(pytest.mark.xdist_group("machines" if is_own else "cluster"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real text and tokenizers are not at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    import ray

    from rayfuse.runtime.connect import join_cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one to HOME
        join_cluster()
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def s3_proxy() -> Iterator[FaultProxy]:
    """An S3 server, met only through a proxy that can spoil what it says.

    Ray's workers find it if their cluster starts later than this fixture.
    """
    moto = MotoServer()
    proxy = FaultProxy(moto.port, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in s3_environment(proxy.port).items():
            patch.setenv(name, value)
        yield proxy
    proxy.stop()
    moto.stop()


@pytest.fixture
def s3_root(s3_proxy: FaultProxy) -> Iterator[str]:
    """A place in a bucket of its own; the proxy passes all on until it is told otherwise."""
    s3_proxy.heal()
    s3_proxy.log.clear()
    s3_proxy.dice.seed(0)
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    make_bucket(s3_proxy.upstream_port, bucket)
    yield f"s3://{bucket}/run"
    s3_proxy.heal()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """Return a file system of its own, of half a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    """One group for all tests of a process: DeepSpeed keeps the first one that it meets."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (names | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items():
            patch.setenv(name, value)
        import torch

        torch.distributed.init_process_group("gloo")
        yield
        torch.distributed.destroy_process_group()


@pytest.fixture
def fresh_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test read the folders of models anew."""
    from rayfuse.models.files import forget_model_files
    from rayfuse.models.tokenizer import load_tokenizer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget_model_files()
    load_tokenizer.cache_clear()
