"""A whole run as a submitted job, on a cluster with a token whose nodes die, over a bad S3."""

import contextlib
import json
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import s3fs

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.config.load import read_recipe
from rayfuse.run.layout import Layout, plan_layout
from rayfuse.storage.verify import verify_data_set
from tests.cluster.job_runs import IS_LONG, write_models_and_text, write_recipe
from tests.local_cluster import LocalCluster
from tests.s3 import FaultProxy

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]

SECONDS_BETWEEN_KILLS = 20.0
MAX_KILLS, MAX_JOBS = 90, 40
NUM_NODES = 3 if IS_LONG else 2
POOLS = ("MapWorker", "RayTrainWorker")
SECRET = "-".join(("canary", "4f1c9d7be2a05583"))
"""In the environment of all that runs and in the token; nothing that is written may have it. In two
parts, since this file goes along with a job."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_models_and_text(folder, 2_400 if IS_LONG else 160)
    return folder


@pytest.fixture(scope="module")
def cluster(s3_proxy, folder) -> Iterator[LocalCluster]:
    """A head that computes nothing, as on a cloud, and workers that may be lost."""
    secrets = {"AWS_SECRET_ACCESS_KEY": SECRET, "HF_TOKEN": f"hf_{SECRET}"}
    cluster = LocalCluster(
        folder, num_cpus=0, with_dashboard=True, token=f"{SECRET}-{'0' * 40}", env=secrets
    )
    for _ in range(NUM_NODES):
        cluster.add_node(num_cpus=3)
    yield cluster
    cluster.stop()


@dataclass
class NodeKiller:
    """SIGKILLs an actor and a random machine now and then, and adds a machine."""

    cluster: LocalCluster
    seed: int
    kills: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.began = time.monotonic()

    def __enter__(self) -> "NodeKiller":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        self.thread.join()

    def _run(self) -> None:
        while len(self.kills) < MAX_KILLS and not self.is_over.wait(SECONDS_BETWEEN_KILLS):
            pools = {name: self.cluster.find_workers(name) for name in POOLS}
            busy = [name for name, workers in pools.items() if workers]
            if pools[POOLS[0]]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.random.choice(pools[POOLS[0]]).kill()
            self.cluster.kill_node(self.random.choice(self.cluster.nodes))
            self.cluster.add_node(num_cpus=3)
            seconds = time.monotonic() - self.began
            self.kills.append(f"{seconds:.0f} s ({', '.join(busy) or 'neither pool'})")


def run_job(cluster: LocalCluster, recipe: Path, *, kill_driver_once: bool = False) -> list[str]:
    """Submit a run, again wherever it fails, until it is done; return what each job printed."""
    said: list[str] = []
    while len(said) < MAX_JOBS:
        job = cluster.submit("jobs/run.py", str(recipe))
        if kill_driver_once:
            kill_driver_once = False
            threading.Thread(target=kill_driver, args=(cluster,), daemon=True).start()
        said.append(job.communicate(timeout=3000)[0])
        # Nobody kills the head.
        assert "ConnectionError: Failed to connect to Ray" not in said[-1], said[-1]
        if job.returncode == 0:
            return said
    raise TimeoutError(f"not done after {MAX_JOBS} jobs; the last said: {said[-1][-4000:]}")


def kill_driver(cluster: LocalCluster) -> None:
    """Kill the first driver once its actors are at work."""
    while not cluster.find_workers("MapWorker"):
        time.sleep(0.2)
    for driver in cluster.find_workers("jobs/run.py"):
        driver.kill()


def read_everything(layout: Layout) -> dict[str, bytes]:
    """Return every shard and every file of a model, by name below the storage."""
    found: dict[str, bytes] = {}
    sources = (*layout.captured.values(), *layout.aligned.values())
    for data in (layout.corpus, layout.held_out, *sources):
        assert not verify_data_set(data).corrupt
        for shard, commit in data.commits().items():
            found[f"{data.folder}/{shard}"] = data.store.read(f"{data.folder}/{commit.file}")
    for run in layout.runs:
        for name in layout.store.sizes(f"{run.folder}/model"):
            if name != "README.md":  # it says when, and how long it took
                file = f"{run.folder}/model/{name}"
                found[file] = layout.store.read(file)
    return found


def test_a_submitted_job_runs_every_stage_and_no_secret_is_written_anywhere(
    cluster, folder, s3_root, s3_proxy: FaultProxy
):
    recipe = write_recipe(folder, "once", f"{s3_root}/once")
    said = run_job(cluster, recipe)
    assert len(said) == 1
    check_report(said[0], plan_layout(read_recipe(recipe), ALIGN_FACTS))
    said.append(submit_bad_recipe(cluster, folder))
    check_secret_is_kept(cluster, said, s3_root.split("/")[2], s3_proxy)


@pytest.mark.skipif(not IS_LONG, reason="long form: RAYFUSE_LONG_CHAOS=1")
def test_nodes_and_the_driver_die_under_a_job_and_every_byte_is_that_of_a_calm_one(
    cluster, folder, s3_root, s3_proxy: FaultProxy
):
    calm = write_recipe(folder, "calm", f"{s3_root}/calm")
    began = time.monotonic()
    said = run_job(cluster, calm)
    print(f"calm: {time.monotonic() - began:.0f} s")
    assert len(said) == 1
    check_report(said[0], plan_layout(read_recipe(calm), ALIGN_FACTS))
    chaos = write_recipe(folder, "chaos", f"{s3_root}/chaos")
    s3_proxy.share = 0.02
    began = time.monotonic()
    with NodeKiller(cluster, seed=5) as killer:
        said += run_job(cluster, chaos, kill_driver_once=True)
    s3_proxy.heal()
    faults = sum(fault is not None for _, _, fault in s3_proxy.log)
    print(
        f"chaos: {time.monotonic() - began:.0f} s, {len(said) - 1} jobs, {faults} requests failed, "
        f"{len(killer.kills)} nodes killed at {'; '.join(killer.kills)}"
    )
    expected, found = (
        read_everything(plan_layout(read_recipe(each), ALIGN_FACTS)) for each in (calm, chaos)
    )
    assert len(expected) > 10
    assert any(name.endswith(".safetensors") for name in expected)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert len(killer.kills) >= 2 and len(said) >= 3
    assert faults > 5
    said.append(submit_bad_recipe(cluster, folder))
    check_secret_is_kept(cluster, said, s3_root.split("/")[2], s3_proxy)


def check_report(said: str, layout: Layout) -> None:
    """Check that a job went through all stages, and said who won."""
    findings = json.loads(layout.store.read("report/findings.json"))
    assert set(findings["bits_per_byte"]) >= {"neox", "target", "fused"}
    assert re.search(r"report +complete in", said)
    assert findings["verdict"]["headline"] in said


def submit_bad_recipe(cluster: LocalCluster, folder: Path) -> str:
    """Submit a recipe with a secret in an address, and return what is said of it."""
    bad = write_recipe(folder, "bad", f"s3://somebody:{SECRET}@bucket/run")
    job = cluster.submit("jobs/run.py", str(bad))
    said = job.communicate(timeout=600)[0]
    assert job.returncode == 1
    assert "contains credentials; remove them" in said
    return said


def check_secret_is_kept(
    cluster: LocalCluster, said: list[str], bucket: str, s3_proxy: FaultProxy
) -> None:
    """Look for the secret in all that was printed, logged, stored or is told to who asks."""
    assert not any(SECRET in each for each in said)
    logs = [path for path in Path(cluster.folder.name).rglob("*") if path.is_file()]
    assert sum("/logs/" in str(path) for path in logs) > 50
    assert [str(path) for path in logs if SECRET.encode() in path.read_bytes()] == []
    store = s3fs.S3FileSystem(
        key="key", secret="secret", endpoint_url=f"http://127.0.0.1:{s3_proxy.upstream_port}"
    )
    objects = store.find(bucket)
    assert len(objects) > 50
    assert [each for each in objects if SECRET.encode() in store.cat_file(each)] == []
    told = {path: ask_dashboard(cluster, path) for path in DASHBOARD_PATHS}
    nodes = json.loads(told["/nodes?view=summary"])["data"]["summary"]
    for node in nodes:
        port = node["raylet"].get("metricsExportPort")
        if port and node["raylet"]["state"] == "ALIVE":
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
                told[f"metrics of {port}"] = answer.read().decode()
    assert any("rayfuse_" in each for name, each in told.items() if name.startswith("metrics"))
    assert [name for name, each in told.items() if SECRET in each] == []


DASHBOARD_PATHS = (
    "/api/jobs/",
    "/nodes?view=summary",
    "/api/cluster_status",
    *(f"/api/v0/{each}?detail=1&limit=1000" for each in ("actors", "tasks", "workers", "nodes")),
)


def ask_dashboard(cluster: LocalCluster, path: str) -> str:
    """Return what the dashboard says to somebody with the token; it says nothing without."""
    url = f"{cluster.env['RAY_API_SERVER_ADDRESS']}{path}"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(url, timeout=60)
    token = Path(cluster.env["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()
