"""Preemption notices of each cloud's metadata service, and the drained node in Ray."""

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

from rayfuse.runtime import preemption
from tests.cluster.checks import ROOT
from tests.local_cluster import LocalCluster

AMAZON, GOOGLE = "/latest/meta-data/spot/instance-action", "/computeMetadata/v1/instance/preempted"


class Metadata(ThreadingHTTPServer):
    """Fake metadata services of both clouds: Amazon's IMDSv2 and Google's."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.notices: dict[str, str] = {GOOGLE: "FALSE"}
        self.tokens: dict[str, float] = {}  # expiry of each, in Unix seconds
        self.faults: list[str] = []  # of the next requests: an HTTP status or another failure
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


def aws_notice(deadline: float) -> str:
    time_text = datetime.fromtimestamp(deadline, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return json.dumps({"action": "terminate", "time": time_text})


def poll_times(metadata: Metadata, poll: Callable[[str], float | None], polls: int) -> float | None:
    """Poll a number of times, after which the node is dead, and return the deadline seen."""
    left = iter([True] * polls)
    return preemption.wait_for_notice(partial(poll, metadata.url), lambda: next(left, False))


FAULTS = ["503", "reset", "garbage", "500"]


@pytest.mark.parametrize(("cloud", "faults"), [("aws", ["expired", *FAULTS]), ("gcp", FAULTS)])
def test_a_notice_is_seen_after_any_failure_of_the_metadata_service(
    cloud, faults, metadata, monkeypatch, caplog
):
    monkeypatch.setattr(preemption, "POLL_SECONDS", 0.01)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be used
    poll = preemption.CLOUDS[cloud]
    assert poll_times(metadata, poll, polls=3) is None
    assert caplog.messages == []
    now = int(time.time())
    metadata.notices |= {AMAZON: aws_notice(now + 120), GOOGLE: "TRUE"}
    metadata.faults += faults
    deadline = poll_times(metadata, poll, polls=len(faults) + 1)
    expected = now + 120 if cloud == "aws" else pytest.approx(now + 25, abs=5)
    assert deadline == expected
    assert len(caplog.messages) == len(faults)


def test_a_repeated_failure_is_logged_once_and_a_dead_node_ends_the_polling(
    metadata, monkeypatch, caplog
):
    monkeypatch.setattr(preemption, "POLL_SECONDS", 0.01)
    metadata.faults += ["403"] * 5
    assert poll_times(metadata, preemption.poll_aws, polls=5) is None
    assert caplog.messages == ["metadata service failed, retrying: HTTP Error 403: Forbidden"]


@pytest.mark.parametrize(
    ("notice", "reason"),
    [
        ("[" * 50_000, "recursion"),
        ("x" * 70_000, "has more than 65,536 bytes"),
        (json.dumps({"time": "2020-01-01T00:00:00Z"}), "is no time of a notice now"),
        (json.dumps({"time": "2999-01-01T00:00:00Z"}), "is no time of a notice now"),
        (json.dumps({"time": "x\x1b[2J"}), "Invalid isoformat string"),
    ],
)
def test_a_reply_that_is_no_notice_does_not_end_the_polling(
    notice, reason, metadata, monkeypatch, caplog
):
    monkeypatch.setattr(preemption, "POLL_SECONDS", 0.01)
    metadata.notices[AMAZON] = notice
    assert poll_times(metadata, preemption.poll_aws, polls=3) is None
    assert reason in caplog.messages[0]
    assert len(caplog.messages[0]) < 400
    assert "\x1b" not in caplog.text


def test_a_redirect_does_not_carry_the_token_to_another_host(metadata, monkeypatch, caplog):
    monkeypatch.setattr(preemption, "POLL_SECONDS", 0.01)
    other = Metadata()
    monkeypatch.setattr(Answer, "do_GET", lambda self: redirect(self, other.url))
    asked: list[str] = []
    monkeypatch.setattr(Answer, "log_message", lambda self, *_: asked.append(self.server.url))
    assert poll_times(metadata, preemption.poll_aws, polls=2) is None
    other.shutdown()
    other.server_close()
    assert set(asked) == {metadata.url}
    assert "HTTP Error 302" in caplog.messages[0]


def redirect(answer: Answer, url: str) -> None:
    answer.send_response(302)
    answer.send_header("Location", url)
    answer.send_header("Content-Length", "0")
    answer.end_headers()


@pytest.mark.parametrize("cloud", preemption.CLOUDS)
def test_ray_up_starts_a_watcher_that_outlives_its_shell(cloud, tmp_path):
    """Start it as Ray's autoscaler does: by ssh and `docker exec`, in a login shell."""
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
    time.sleep(0.5)  # a hang-up of the shell would have killed it by now
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
from rayfuse.runtime.ray_internals import list_draining_nodes
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=1)
class Work:
    def find(self):
        node = ray.get_runtime_context().get_node_id()
        return ray.util.get_node_ip_address(), node

work = Work.remote()
print(json.dumps(ray.get(work.find.remote())), flush=True)
while True:
    print(json.dumps(list_draining_nodes()), flush=True)
    time.sleep(0.3)
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Iterator[LocalCluster]:
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # as a private cluster leaves it
    cluster = LocalCluster(tmp_path, num_cpus=0, token=secrets.token_hex(32))
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.stop()


@pytest.fixture
def start(cluster) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Yield a function that starts Python on the cluster; its processes end after the test."""
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
@pytest.mark.timeout(300)
def test_ray_drains_a_node_with_a_notice_until_its_deadline(start, cluster, metadata):
    work = start("-c", WORK)
    address, node = json.loads(work.stdout.readline())

    def watch(cloud: str) -> subprocess.Popen[str]:
        where = (f"--address=127.0.0.1:{cluster.port}", f"--node-ip-address={address}")
        service = (f"--cloud={cloud}", f"--metadata-url={metadata.url}")
        process = start("-m", "rayfuse.runtime.preemption", *where, *service)
        assert f"node {node} at {address}: polling {cloud}" in process.stdout.readline()
        return process

    on_amazon, on_google = watch("aws"), watch("gcp")
    assert json.loads(work.stdout.readline()) == {}
    metadata.faults += ["500", "500", "500"]
    deadline = int(time.time()) + 90
    metadata.notices[AMAZON] = aws_notice(deadline)
    output, _ = on_amazon.communicate(timeout=60)
    assert "draining" in output
    while not (draining := json.loads(work.stdout.readline())):
        pass
    assert draining == {node: deadline * 1000}
    assert on_google.poll() is None  # no notice, so it polls as long as the node lives
    work.kill()  # a drained node ends once nothing runs on it
    output, _ = on_google.communicate(timeout=60)
    assert f"node {node} is dead" in output
    assert (on_amazon.returncode, on_google.returncode) == (0, 0)
