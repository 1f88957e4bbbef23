"""Faults 1, 3 and 5: kills at any time leave the data sets bit-identical."""

import random
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.config.load import read_recipe
from rayfuse.run.layout import plan_layout
from tests.chaos.runs import (
    COMMAND,
    IS_LONG,
    Content,
    make_corpus,
    read_content,
    run_command,
    start_capture,
)
from tests.local_cluster import LocalCluster, kill_tree

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

STALL = "stall:30" if IS_LONG else "stall:2"
FAULTS = ["500", "503", "slowdown", "reset", "lost_reply", "truncate", STALL]
MIN_KILLS, MAX_KILLS = (20, 24) if IS_LONG else (6, 8)
SIGNALS = [signal.SIGTERM, signal.SIGINT] if IS_LONG else [signal.SIGTERM]
SECONDS = 900


@dataclass
class Chaos:
    """Kills actors, nodes and drivers of a running capture at random times."""

    cluster: LocalCluster
    recipe: Path
    seed: int
    kills: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.deck = [self.kill_node, self.kill_driver, *[self.kill_actor] * 6] * (MAX_KILLS // 8)
        self.random.shuffle(self.deck)
        self.node = self.cluster.add_node(num_cpus=3)
        self.driver = self.start_driver()

    def start_driver(self) -> subprocess.Popen[bytes]:
        env = self.cluster.env | {"RAY_ADDRESS": f"127.0.0.1:{self.cluster.port}"}
        arguments = [COMMAND, "capture", str(self.recipe)]
        with open(self.recipe.with_suffix(".log"), "ab") as log:
            return subprocess.Popen(
                arguments, env=env, stdout=log, stderr=log, start_new_session=True
            )

    def run(self) -> None:
        """Kill until there were enough kills, then let the run end."""
        began = time.monotonic()
        while time.monotonic() - began < SECONDS:
            time.sleep(self.random.uniform(0.2, 3.0))
            code = self.driver.poll()
            if code == 0:
                return
            if code is not None:  # a run may fail when its nodes are lost: start it again
                self.driver = self.start_driver()
                continue
            if len(self.kills) < MAX_KILLS and self.cluster.find_workers("MapWorker"):
                self.deck[len(self.kills)]()
        raise TimeoutError(f"not done after {SECONDS} s; kills: {self.kills}")

    def kill_actor(self) -> None:
        actors = self.cluster.find_workers("MapWorker")
        if actors:
            try:
                self.random.choice(sorted(actors, key=lambda actor: actor.pid)).kill()
                self.kills.append("actor")
            except psutil.NoSuchProcess:
                return

    def kill_node(self) -> None:
        self.cluster.kill_node(self.node)
        self.node = self.cluster.add_node(num_cpus=3)
        self.kills.append("node")

    def kill_driver(self) -> None:
        self.driver.kill()
        self.driver.wait()
        self.driver = self.start_driver()
        self.kills.append("driver")


def check_chaos(cluster: LocalCluster, recipe: Path, seed: int, calm_content: Content) -> None:
    """Capture while processes are killed, and compare every byte."""
    began = time.monotonic()
    chaos = Chaos(cluster, recipe, seed)
    try:
        chaos.run()
    finally:
        kill_tree(chaos.driver)
        cluster.kill_node(chaos.node)
    seconds = time.monotonic() - began
    print(f"seed {seed}: {len(chaos.kills)} kills in {seconds:.0f} s: {', '.join(chaos.kills)}")
    # Align what a killed driver had captured but not yet aligned.
    assert run_command(cluster, "align", str(recipe)).returncode == 0
    assert read_content(recipe) == calm_content
    assert len(chaos.kills) >= MIN_KILLS
    assert {"actor", "node", "driver"} <= set(chaos.kills)


@pytest.mark.skipif(not IS_LONG, reason="the same on S3 has a short form; RAYFUSE_LONG_CHAOS=1")
def test_fault_1_3_5_killing_anything_changes_no_byte_on_a_local_disk(
    cluster, folder, calm_content
):
    recipe = make_corpus(cluster, folder, "local", str(folder / "storage-local"))
    check_chaos(cluster, recipe, 1, calm_content)


def test_fault_1_3_5_7_killing_anything_changes_no_byte_on_s3_where_5_percent_of_requests_fail(
    cluster, folder, calm_content, s3_root, s3_proxy
):
    recipe = make_corpus(cluster, folder, "s3", s3_root)
    s3_proxy.share, s3_proxy.kinds = 0.05, FAULTS
    check_chaos(cluster, recipe, 2, calm_content)
    assert sum(done is not None for _, _, done in s3_proxy.log) > 20


def test_fault_8_unavailable_storage_stops_the_run_and_it_resumes_once_the_storage_is_back(
    cluster, folder, calm_content, s3_root, s3_proxy
):
    recipe = make_corpus(cluster, folder, "gone", s3_root)
    timeout = "storage_retry_seconds=8"
    env = cluster.env | {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"}
    driver = subprocess.Popen(
        [COMMAND, "capture", str(recipe), timeout], env=env, stderr=subprocess.PIPE, text=True
    )
    layout = plan_layout(read_recipe(recipe), ALIGN_FACTS)
    while not any(data.list_committed() for data in layout.captured.values()):
        assert driver.poll() is None
        time.sleep(0.3)
    s3_proxy.gone = True
    _, message = driver.communicate(timeout=240)
    s3_proxy.gone = False
    assert driver.returncode == 1
    assert f"storage {s3_root} has failed for" in message, message[-3000:]
    assert "run the same command again once the storage is back" in message
    assert run_command(cluster, "capture", str(recipe)).returncode == 0
    assert run_command(cluster, "align", str(recipe)).returncode == 0
    assert read_content(recipe) == calm_content


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_fault_36_a_capture_stops_on_a_signal_and_resumes_later(
    number, cluster, folder, calm_content
):
    storage = folder / f"storage-{number.name}"
    recipe = make_corpus(cluster, folder, number.name, str(storage))
    driver = start_capture(cluster, recipe)
    driver.send_signal(number)
    _, message = driver.communicate(timeout=60)
    assert driver.returncode == 130, message[-3000:]
    assert "interrupted; run the same command to resume" in message
    assert "Traceback" not in message
    made = {path: path.stat().st_mtime_ns for path in storage.glob("captured/*/commits/*.json")}
    assert made
    assert run_command(cluster, "capture", str(recipe)).returncode == 0
    assert run_command(cluster, "align", str(recipe)).returncode == 0
    assert read_content(recipe) == calm_content
    assert {path: path.stat().st_mtime_ns for path in made} == made


@pytest.mark.skipif(not IS_LONG, reason="drivers die in the short form too; RAYFUSE_LONG_CHAOS=1")
def test_fault_5_a_capture_that_dies_with_its_cluster_resumes_on_another(
    cluster, folder, calm_content
):
    storage = folder / "storage-head"
    recipe = make_corpus(cluster, folder, "head", str(storage))
    kill_tree(start_capture(cluster, recipe, is_own=True))
    made = {path: path.stat().st_mtime_ns for path in storage.glob("captured/*/commits/*.json")}
    assert made
    assert run_command(cluster, "capture", str(recipe)).returncode == 0
    assert run_command(cluster, "align", str(recipe)).returncode == 0
    assert read_content(recipe) == calm_content
    assert {path: path.stat().st_mtime_ns for path in made} == made


@pytest.mark.skipif(not IS_LONG, reason="a minute and a half; RAYFUSE_LONG_CHAOS=1")
def test_fault_4_the_only_actor_leaves_a_draining_node(cluster, folder, calm_content):
    """The node drains but stays: an actor that stayed on it would get no work and wait forever."""
    recipe = make_corpus(
        cluster,
        folder,
        "spot",
        str(folder / "storage-spot"),
        accelerator_type="L4",
        gpus=0,
        max_actors=1,
    )
    there = cluster.list_nodes()
    nodes = [cluster.add_node(num_cpus=3, accelerator="L4")]
    while not (joined := cluster.list_nodes() - there):
        time.sleep(0.5)
    driver = start_capture(cluster, recipe)
    nodes.append(cluster.add_node(num_cpus=3, accelerator="L4"))
    cluster.drain_node(joined.pop(), seconds=3600)
    _, message = driver.communicate(timeout=400)
    for node in nodes:
        cluster.kill_node(node)
    assert driver.returncode == 0, message[-3000:]
    assert run_command(cluster, "align", str(recipe)).returncode == 0
    assert read_content(recipe) == calm_content
