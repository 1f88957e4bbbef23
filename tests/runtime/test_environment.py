"""A cluster of one's own is private: token, folder, ports; relative paths mean the same there."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rayfuse.config.base import UserError
from rayfuse.runtime import environment, worker_setup
from rayfuse.runtime.connect import JOB_CONFIG, worker_env
from rayfuse.runtime.environment import (
    CACHE_FOLDERS,
    open_cluster_folder,
    open_private_folder,
    prepare_environment,
)
from rayfuse.runtime.worker_setup import DRIVER_FOLDER, return_to_folder, set_up_worker
from tests.cluster.checks import ROOT


@pytest.fixture
def base(monkeypatch):
    """Yield a short folder for temporary files that all users can write, as /tmp is."""
    with tempfile.TemporaryDirectory(prefix="e", dir="/tmp") as folder:
        Path(folder).chmod(0o1777)
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


def test_the_private_folder_is_only_this_users(base: Path):
    folder = open_private_folder()
    assert folder == base / f"rayfuse-private-{os.geteuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert open_private_folder() == folder
    assert open_cluster_folder() == folder / "ray"


def test_a_folder_that_others_can_change_is_refused(base: Path, tmp_path: Path):
    folder = open_private_folder()
    folder.chmod(0o755)
    with pytest.raises(UserError, match=r"is not a folder of this user alone .* set RAY_TMPDIR"):
        open_private_folder()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(UserError, match="is not a folder of this user alone"):
        open_private_folder()
    folder.unlink()
    folder.write_text("")
    with pytest.raises(UserError, match="cannot be created"):
        open_private_folder()
    folder.unlink()
    base.chmod(0o777)
    with pytest.raises(UserError, match="all users can replace folders of others"):
        open_private_folder()


def test_another_users_folder_is_refused(base: Path, monkeypatch):
    folder = open_private_folder()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    folder.rename(base / "rayfuse-private-12345")
    with pytest.raises(UserError, match="is not a folder of this user alone"):
        open_private_folder()


def test_a_path_too_long_for_sockets_names_the_remedy(base: Path, monkeypatch):
    deep = base / ("x" * 60)
    deep.mkdir()
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(UserError, match=r"bytes in its path.*set RAY_TMPDIR to a shorter one"):
        open_cluster_folder()


@pytest.fixture
def variables(monkeypatch) -> dict[str, str]:
    """Yield an environment of its own."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own = {name: value for name, value in own.items() if name not in CACHE_FOLDERS}
    monkeypatch.setattr(os, "environ", own)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    return own


def test_an_own_cluster_demands_a_random_token_and_a_joined_one_its_own(variables):
    prepare_environment()
    first = variables["RAY_AUTH_TOKEN"]
    assert variables["RAY_AUTH_MODE"] == "token"
    assert len(first) == 64
    del variables["RAY_AUTH_TOKEN"]
    prepare_environment()
    assert variables["RAY_AUTH_TOKEN"] != first
    variables.clear()
    variables |= {"RAY_ADDRESS": "10.0.0.1:6379", "HOME": os.path.expanduser("~")}
    prepare_environment()
    assert not [name for name in variables if name.startswith("RAY_AUTH")]


def test_a_process_that_has_imported_ray_keeps_its_settings(variables, monkeypatch):
    """Its compiled part has read them, and would not know a token that the cluster demands."""
    monkeypatch.setitem(sys.modules, "ray", object())
    before = dict(variables)
    prepare_environment()
    assert variables == before


@pytest.mark.parametrize("home", ["/nowhere", "/proc"])
def test_without_a_home_caches_are_in_the_private_folder(home, base, variables, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    variables |= {"HOME": home, "RAY_TMPDIR": str(base), "MPLCONFIGDIR": "/mine"}
    environment.provide_cache_folders()
    assert variables["NUMBA_CACHE_DIR"] == str(open_private_folder() / "cache" / "numba")
    assert variables["MPLCONFIGDIR"] == "/mine"
    assert variables["HOME"] == (home if Path(home).is_dir() else str(open_private_folder()))


CLUSTER = """
import json, os, sys
from rayfuse.runtime.environment import prepare_environment
prepare_environment()
from rayfuse.runtime.connect import join_cluster
join_cluster()
import psutil, ray
from pathlib import Path

@ray.remote
def look():
    return os.getcwd(), Path("relative.txt").read_text()

tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
folder = ray._private.worker._global_node.get_session_dir_path()
found = {
    "worker": ray.get(look.remote()),
    "session": folder,
    "addresses": sorted({
        connection.laddr.ip.removeprefix("::ffff:")
        for process in tree for connection in process.net_connections("inet")
        if connection.status == "LISTEN"
    }),
}
print(json.dumps(found))
"""


@pytest.mark.ray
def test_an_own_cluster_listens_on_loopback_in_a_private_folder(base: Path, tmp_path: Path):
    (tmp_path / "relative.txt").write_text("same file")
    home = tmp_path / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env = kept | {"PYTHONPATH": str(ROOT), "HOME": str(home), "RAY_TMPDIR": str(base)}
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["addresses"] == ["127.0.0.1"]
    assert found["worker"] == [str(tmp_path), "same file"]
    private = base / f"rayfuse-private-{os.geteuid()}"
    assert Path(found["session"]).is_relative_to(private)
    assert private.stat().st_mode & 0o777 == 0o700  # Ray opens what it is given to all users
    assert not (home / ".ray").exists()


def test_a_worker_enters_the_drivers_folder_if_its_node_has_it(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "driver").mkdir()
    monkeypatch.setattr(worker_setup, "set_up_worker_logs", lambda: None)
    monkeypatch.setenv(DRIVER_FOLDER, str(tmp_path / "driver"))
    set_up_worker()
    assert Path.cwd() == tmp_path / "driver"
    monkeypatch.setenv(DRIVER_FOLDER, "/nowhere")
    set_up_worker()
    assert Path.cwd() == tmp_path / "driver"
    monkeypatch.chdir(tmp_path)  # as Ray Train does
    return_to_folder()
    assert Path.cwd() == tmp_path / "driver"


@pytest.mark.parametrize("is_job", [False, True])
def test_workers_of_a_submitted_job_stay_in_their_copy_of_its_folder(is_job: bool, monkeypatch):
    monkeypatch.delenv(JOB_CONFIG, raising=False)
    if is_job:
        monkeypatch.setenv(JOB_CONFIG, "{}")
    assert (DRIVER_FOLDER in worker_env()) != is_job


def test_collectives_of_an_own_cluster_listen_on_loopback(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert worker_env()["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "GLOO_SOCKET_IFNAME" not in worker_env()
