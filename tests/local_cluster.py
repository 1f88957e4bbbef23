"""A Ray cluster of several nodes on this machine, of our own processes, to be broken by tests."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]

LIST_NODES = """
import json, os, ray
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
print(json.dumps([node["NodeID"] for node in ray.nodes() if node["Alive"]]))
"""


GIVEN: set[int] = set()
"""Ports that are somebody's, whether or not they are used yet."""


def free_port() -> int:
    """Return a port that nothing listens on, below those that the system gives to whoever asks for
    any: Ray's workers take many of them, and one could be gone before it is used.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        if port in GIVEN:
            continue
        GIVEN.add(port)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def wait_for(ready: Callable[[], bool], server: subprocess.Popen[Any]) -> None:
    """Wait until a server of ours is ready, and raise if it ends instead."""
    for _ in range(240):
        if server.poll() is not None:
            raise RuntimeError(f"it ended with code {server.returncode}: {server.args}")
        if ready():
            return
        time.sleep(0.5)
    raise TimeoutError(f"it is not ready: {server.args}")


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def is_up(temp_dir: str) -> bool:
    """Return whether a head has all its processes: Ray writes down its address last."""
    return Path(temp_dir, "ray_current_cluster").exists()


def ray_command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("ray")), *arguments]


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """SIGKILL a process we started, and all that came from it."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    process.kill()
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


class LocalCluster:
    """A head, and nodes that may come and go. Ends, and ends only, what it has started.

    Args:
        home: Where its processes believe to be at home.
        num_cpus: Of the head.
        with_dashboard: It takes jobs.
        token: Who does not know it is turned away; by default anybody may do anything.
        env: More of the environment of all that it starts.
    """

    def __init__(
        self,
        home: Path,
        *,
        num_cpus: int,
        with_dashboard: bool = False,
        token: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.port, self.dashboard = free_port(), free_port()
        self.folder = tempfile.TemporaryDirectory(prefix="rc", dir="/tmp")
        # Ray's own settings of this process, which may run another cluster, are not this one's.
        given = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.env = given | {
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "disabled",
            "DS_ACCELERATOR": "cpu",
        }
        if token is not None:
            file = home / "ray-token"
            file.touch(mode=0o600)
            file.write_text(token)
            self.env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}
        self.env |= env or {}
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.number = 0
        arguments = [f"--port={self.port}"]
        if with_dashboard:
            arguments += [f"--dashboard-port={self.dashboard}", "--dashboard-host=127.0.0.1"]
        else:
            arguments += ["--include-dashboard=false"]
        self.head = self._start("--head", f"--num-cpus={num_cpus}", *arguments)
        try:
            wait_for(lambda: is_up(f"{self.folder.name}/0"), self.head)
            if with_dashboard:
                wait_for(lambda: listens(self.dashboard), self.head)
        except BaseException:
            kill_tree(self.head)
            raise
        self.env["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{self.dashboard}"

    def add_node(self, *, num_cpus: int, accelerator: str = "") -> subprocess.Popen[bytes]:
        """Start one more node, as if it had a kind of GPU; it joins within seconds."""
        resources = {f"accelerator_type:{accelerator}": 1} if accelerator else {}
        self.number += 1
        node = self._start(
            *(f"--address=127.0.0.1:{self.port}", f"--num-cpus={num_cpus}"),
            f"--resources={json.dumps(resources)}",
        )
        self.nodes.append(node)
        return node

    def kill_node(self, node: subprocess.Popen[bytes]) -> None:
        """SIGKILL a node and all that runs on it."""
        kill_tree(node)
        self.nodes.remove(node)

    def list_nodes(self) -> set[str]:
        """Return the ids of the nodes that have joined and live."""
        env = self.env | {"RAY_ADDRESS": f"127.0.0.1:{self.port}"}
        done = subprocess.run(
            [sys.executable, "-c", LIST_NODES], env=env, capture_output=True, text=True, check=True
        )
        return set(json.loads(done.stdout.splitlines()[-1]))

    def drain_node(self, node_id: str, *, seconds: int) -> None:
        """Give notice, as a cloud does, that a node is to be taken away."""
        drain = ray_command(
            *("drain-node", f"--address=127.0.0.1:{self.port}", f"--node-id={node_id}"),
            *("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"),
            f"--deadline-remaining-seconds={seconds}",
        )
        subprocess.run(drain, env=self.env, capture_output=True, check=True)

    def submit(self, *arguments: str) -> subprocess.Popen[str]:
        """Begin to run a script of this project as a job, as `ray job submit` does."""
        return subprocess.Popen(
            ray_command("job", "submit", "--working-dir", str(ROOT), "--", "python", *arguments),
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def find_workers(self, name: str) -> list[psutil.Process]:
        """Return the cluster's workers whose title has a name in it."""
        found: list[psutil.Process] = []
        for node in (self.head, *self.nodes):
            try:
                for each in psutil.Process(node.pid).children(recursive=True):
                    if name in " ".join(each.cmdline()):
                        found.append(each)
            except psutil.NoSuchProcess:
                continue
        return found

    def stop(self) -> None:
        """End all nodes."""
        for node in (*self.nodes, self.head):
            os.killpg(node.pid, signal.SIGTERM)
        for node in (*self.nodes, self.head):
            try:
                node.wait(timeout=5)
            except subprocess.TimeoutExpired:
                kill_tree(node)
        self.folder.cleanup()

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        ports = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent")
        return subprocess.Popen(
            ray_command(
                *("start", "--block", "--disable-usage-stats"),
                # A folder and an address of its own, as a machine has: else a job's code is put
                # anew into the folder that its driver runs in, and a driver may join any node.
                f"--temp-dir={self.folder.name}/{self.number}",
                f"--node-ip-address=127.0.{self.number // 250}.{self.number % 250 + 1}",
                # The usual ports are another cluster's on this machine: jobs would not start.
                *(f"--{name}-port={free_port()}" for name in (*ports, "metrics-export")),
                "--object-store-memory=200000000",
                *arguments,
            ),
            env=self.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
