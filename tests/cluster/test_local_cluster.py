"""cluster/local.sh for real: a head and two nodes, a job, metrics, a node lost, nothing left."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.checks import ROOT
from tests.cluster.test_dashboard import find_exported
from tests.cluster.test_scripts import LOCAL

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("RAYFUSE_LONG_CHAOS"), reason="a minute; RAYFUSE_LONG_CHAOS=1"
    ),
]

JOB = """
import os, ray
from rayfuse.runtime.metrics import count_work

ray.init(log_to_driver=False)

@ray.remote(num_cpus=1)
def work(stage):
    count_work(stage, "try", rows=2, tokens=30, seconds=0.5)
    return ray.get_runtime_context().get_node_id()

nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
anywhere = {nodes[ray.get(work.remote("corpus"))]["Resources"]["CPU"] for _ in range(4)}
on_l4 = nodes[ray.get(work.options(accelerator_type="L4").remote("align"))]
assert on_l4["Labels"]["ray.io/accelerator-type"] == "L4"
print("auth", os.environ["RAY_AUTH_MODE"], "nodes", len(nodes), "CPUs", anywhere, os.getcwd())
"""


def test_a_local_cluster_runs_jobs_asks_for_its_token_and_leaves_nothing(tmp_path):
    environment = os.environ | {
        "RAYFUSE_LOCAL": str(tmp_path / "local"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CPUS": "2",
        "OBJECT_STORE": "100000000",
    }
    (tmp_path / "job").mkdir()
    (tmp_path / "job/job.py").write_text(JOB)
    run("start", "cpu", "L4", environment=environment)
    try:
        lines = (line.partition("=") for line in (tmp_path / "local/head").read_text().splitlines())
        temp = next(value for name, _, value in lines if name == "temp")
        exports = run("env", environment=environment).removeprefix("export ").split()
        client = environment | dict(each.split("=", 1) for each in exports)
        job = submit(tmp_path / "job", client | {"PYTHONPATH": str(ROOT)})
        assert job.returncode == 0, job.stdout[-3000:]
        assert "auth token nodes 3 CPUs {2.0}" in job.stdout
        stranger = submit(tmp_path / "job", client | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "no")})
        assert stranger.returncode != 0
        counted = {name for name in find_exported() if "capture" not in name}
        assert counted <= scrape(Path(temp) / "head/prom_metrics_service_discovery.json", counted)
        run("kill", "2", environment=environment)
        assert "node-3: H100" in run("add", "H100", environment=environment)
    finally:
        run("stop", environment=environment)
    assert not [each for each in commands() if temp in each]
    assert not Path(temp).exists()
    assert not (tmp_path / "local").exists()


def run(*arguments: str, environment: dict[str, str]) -> str:
    command = [str(LOCAL), *arguments]
    return subprocess.check_output(command, env=environment, text=True, timeout=300)


def submit(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    python_path = json.dumps({"env_vars": {"PYTHONPATH": environment.get("PYTHONPATH", "")}})
    return subprocess.run(
        [
            *("ray", "job", "submit", "--working-dir", str(folder)),
            *("--runtime-env-json", python_path, "--", "python", "job.py"),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def scrape(discovery: Path, wanted: set[str]) -> set[str]:
    """Return the names of all metrics, as soon as those wanted are among them."""
    names: set[str] = set()
    for _ in range(20):
        for group in json.loads(discovery.read_text()):
            for target in group["targets"]:
                with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as page:
                    lines = page.read().decode().splitlines()
                names |= {line.partition("{")[0] for line in lines}
        if wanted <= names:
            break
        time.sleep(3)
    return names


def commands() -> Iterator[str]:
    for process in psutil.process_iter(["cmdline"]):
        yield " ".join(process.info["cmdline"] or [])
