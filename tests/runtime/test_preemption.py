"""Notices of the clouds, as their metadata services speak, and what Ray then knows of its nodes."""

import json
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import yaml
from ray.autoscaler._private.command_runner import _with_environment_variables, _with_interactive
from ray.autoscaler._private.docker import with_docker_exec
from ray.autoscaler._private.util import with_head_node_ip

from rayfuse.runtime import preemption as notice
from tests.cluster.checks import ROOT
from tests.local_cluster import LocalCluster

AMAZON, GOOGLE = "/latest/meta-data/spot/instance-action", "/computeMetadata/v1/instance/preempted"


class Metadata(ThreadingHTTPServer):
    """The metadata services of both clouds: IMDSv2 alone, and Google's."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.notices: dict[str, str] = {GOOGLE: "FALSE"}
        self.tokens: dict[str, float] = {}  # until when each is good
        self.faults: list[str] = []  # of the next requests: a status, or another way to fail
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        lifetime = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        if self.path != "/latest/api/token" or not 1 <= int(lifetime) <= 21600:
            return self.reply(400)
        token = secrets.token_urlsafe(40)
        self.server.tokens[token] = time.time() + int(lifetime)
        self.reply(200, token)

    def do_GET(self) -> None:
        server, path = self.server, self.path
        server.asked.append(path)
        fault = server.faults.pop(0) if server.faults else ""
        if fault == "expired":
            server.tokens.clear()
        elif fault == "reset":
            return self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "garbage":
            return self.reply(200, "<html>")
        elif fault:
            return self.reply(int(fault))
        if path == AMAZON:
            token = self.headers.get("X-aws-ec2-metadata-token", "")
            if server.tokens.get(token, 0) < time.time():
                return self.reply(401)
        elif self.headers.get("Metadata-Flavor") != "Google":
            return self.reply(403)
        self.reply(200 if path in server.notices else 404, server.notices.get(path, ""))

    def reply(self, status: int, text: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    server = Metadata()
    yield server
    server.shutdown()
    server.server_close()


def tell_amazon(deadline: float) -> str:
    told = datetime.fromtimestamp(deadline, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return json.dumps({"action": "terminate", "time": told})


def look(metadata: Metadata, ask: Callable[[str], float | None], looks: int) -> float | None:
    """Return what is known after so many looks, on a node that is there that long."""
    left = iter([True] * looks)
    return notice.watch_for_preemption(partial(ask, metadata.url), lambda: next(left, False))


FAULTS = ["503", "reset", "garbage", "500"]


@pytest.mark.parametrize(("cloud", "faults"), [("aws", ["expired", *FAULTS]), ("gcp", FAULTS)])
def test_a_notice_is_heard_however_the_service_fails_before(
    cloud, faults, metadata, monkeypatch, caplog
):
    monkeypatch.setattr(notice, "LOOK_SECONDS", 0.01)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing of this machine is there
    ask = notice.CLOUDS[cloud]
    assert look(metadata, ask, looks=3) is None
    assert caplog.messages == []
    now = int(time.time())
    metadata.notices |= {AMAZON: tell_amazon(now + 120), GOOGLE: "TRUE"}
    metadata.faults += faults
    deadline = look(metadata, ask, looks=len(faults) + 1)
    expected = now + 120 if cloud == "aws" else pytest.approx(now + 25, abs=5)
    assert deadline == expected
    assert len(caplog.messages) == len(faults)


def test_a_service_that_always_fails_is_told_once_and_a_node_that_is_gone_ends_it(
    metadata, monkeypatch, caplog
):
    monkeypatch.setattr(notice, "LOOK_SECONDS", 0.01)
    metadata.faults += ["403"] * 5
    assert look(metadata, notice.poll_aws, looks=5) is None
    assert caplog.messages == ["the metadata service is asked again: HTTP Error 403: Forbidden"]


@pytest.mark.parametrize("cloud", notice.CLOUDS)
def test_ray_up_starts_a_watch_that_outlives_the_shell_it_was_started_in(cloud, tmp_path):
    """As Ray's autoscaler does it: a login shell with a terminal, by ssh and `docker exec`."""
    config = yaml.safe_load((ROOT / f"cluster/{cloud}.yaml").read_text())
    watch = config["worker_start_ray_commands"][-1].replace("/tmp/ray", str(tmp_path))
    (command,) = with_head_node_ip([watch], "192.0.2.7")
    command = " ".join(_with_interactive(_with_environment_variables(command, {"X": {"CPU": 8}})))
    (command,) = with_docker_exec([command], "rayfuse", "docker", with_interactive=True)
    write_script(tmp_path / "docker", 'shift 3; exec "$@"')
    write_script(tmp_path / "python", 'echo $$ "$RAY_AUTH_MODE" "$@"; exec sleep 60')
    (tmp_path / ".bashrc").write_text(f"export PATH={tmp_path}:$PATH\n")
    env = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["script", "-qec", command, "/dev/null"], env=env, check=True, timeout=60)
    log = tmp_path / "notice.log"
    for _ in range(120):
        if log.exists() and log.read_text():
            break
        time.sleep(0.25)
    time.sleep(0.5)  # what would end it has had the time to
    number, *started = log.read_text().split()
    process = psutil.Process(int(number))
    assert process.status() == psutil.STATUS_SLEEPING
    process.kill()
    where = ["-m", "rayfuse.runtime.preemption", f"--cloud={cloud}", "--address=192.0.2.7:6379"]
    assert started == ["token", *where]


def write_script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


WORK = """
import json, os, time
import ray
from ray._private.state import state
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=1)
class Work:
    def find(self):
        node = ray.get_runtime_context().get_node_id()
        return ray.util.get_node_ip_address(), node

work = Work.remote()
print(json.dumps(ray.get(work.find.remote())), flush=True)
while True:
    print(json.dumps(state.get_draining_nodes()), flush=True)
    time.sleep(0.3)
"""


@pytest.fixture
def cluster(tmp_path) -> Iterator[LocalCluster]:
    cluster = LocalCluster(tmp_path, num_cpus=0, token=secrets.token_hex(32))
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.stop()


@pytest.fixture
def start(cluster) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Yield what starts Python on the cluster, and ends it after the test."""
    started: list[subprocess.Popen[str]] = []
    env = cluster.env | {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}", "PYTHONPATH": str(ROOT)}

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, *arguments]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=env, **output))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.ray
def test_ray_drains_the_node_that_has_notice_until_its_time(start, cluster, metadata):
    work = start("-c", WORK)
    address, node = json.loads(work.stdout.readline())

    def watch(cloud: str) -> subprocess.Popen[str]:
        where = (f"--address=127.0.0.1:{cluster.port}", f"--node-ip-address={address}")
        service = (f"--cloud={cloud}", f"--metadata-url={metadata.url}")
        process = start("-m", "rayfuse.runtime.preemption", *where, *service)
        assert f"node {node} at {address} asks {cloud}" in process.stdout.readline()
        return process

    on_amazon, on_google = watch("aws"), watch("gcp")
    assert json.loads(work.stdout.readline()) == {}
    metadata.faults += ["500", "500", "500"]
    deadline = int(time.time()) + 90
    metadata.notices[AMAZON] = tell_amazon(deadline)
    said, _ = on_amazon.communicate(timeout=60)
    assert "Ray was told" in said
    while not (draining := json.loads(work.stdout.readline())):
        pass
    assert draining == {node: deadline * 1000}
    assert (
        on_google.poll() is None
    )  # a machine without notice is watched for as long as it is there
    work.kill()  # a node that is drained goes once nothing is left to do
    said, _ = on_google.communicate(timeout=60)
    assert f"node {node} is gone" in said
    assert (on_amazon.returncode, on_google.returncode) == (0, 0)
