"""A cluster that grows and shrinks by itself: Ray's autoscaler, and this machine as its cloud."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.config.load import read_recipe
from rayfuse.run.layout import Layout, plan_layout
from tests.chaos.runs import COMMAND
from tests.cluster.job_runs import write_models_and_text, write_recipe
from tests.local_cluster import free_port, is_up, kill_tree, ray_command, wait_for

HEAD_ID = "f" * 51 + "00000"

KINDS: dict[str, dict[str, int]] = {
    "cpu": {"CPU": 2},
    "l4": {"CPU": 2, "GPU": 1, "accelerator_type:L4": 1},
    "a10g": {"CPU": 2, "GPU": 1, "accelerator_type:A10G": 1},
    "a100": {"CPU": 2, "GPU": 2, "accelerator_type:A100": 1},
}
"""Kinds of machine and what each has. Their GPUs are counted, not there."""

MAX_OF_A_KIND = 2

IDLE_SECONDS = 12.0
"""After which a machine without work goes."""

WATCH = """
import json, os, sys, time
import ray
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
kinds = json.loads(sys.argv[1])
while True:
    alive = [set(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    counts = {kind: sum(kind in each for each in alive) for kind in kinds}
    print(json.dumps({"time": time.time(), "nodes": counts}), flush=True)
    time.sleep(0.5)
"""


class FakeCloud:
    """A head without workers, and kinds of machine that come when they are asked for."""

    def __init__(self, home: Path, env: dict[str, str]) -> None:
        self.port = free_port()
        self.folder = tempfile.TemporaryDirectory(prefix="fc", dir="/tmp")
        self.samples = home / "nodes.jsonl"
        file = home / "autoscaler.json"
        file.write_text(json.dumps(self._config()))
        self.env = env | {
            "RAY_ADDRESS": f"127.0.0.1:{self.port}",
            "RAY_AUTH_MODE": "disabled",
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        }
        self.head = subprocess.Popen(
            ray_command(
                *("start", "--head", "--block", f"--port={self.port}", "--num-cpus=0"),
                *("--node-ip-address=127.0.0.1", "--disable-usage-stats"),
                *("--object-store-memory=150000000", f"--temp-dir={self.folder.name}"),
                *("--include-dashboard=false", f"--autoscaling-config={file}"),
                *(f"--{name}-port={free_port()}" for name in ("metrics-export",)),
            ),
            env=self.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for(lambda: is_up(self.folder.name), self.head)
        env = {k: v for k, v in self.env.items() if not k.startswith("RAY_OVERRIDE")}
        with open(self.samples, "w") as out:
            self.watcher = subprocess.Popen(
                [sys.executable, "-c", WATCH, json.dumps([f"kind:{kind}" for kind in KINDS])],
                env=env,
                stdout=out,
                stderr=subprocess.DEVNULL,
            )

    def list_samples(self) -> list[tuple[float, dict[str, int]]]:
        """Return how many machines of each kind there were, over time, in seconds."""
        lines = [json.loads(line) for line in self.samples.read_text().splitlines()]
        return [
            (line["time"], {kind: line["nodes"][f"kind:{kind}"] for kind in KINDS})
            for line in lines
        ]

    def ask(self, script: str) -> str:
        """Return what a driver prints."""
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.strip()

    def wait_until_empty(self, seconds: float) -> bool:
        """Return whether all machines but the head go within a time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not any(self.list_samples()[-1][1].values()):
                return True
            time.sleep(0.5)
        return False

    def stop(self) -> None:
        """End the head and all machines that it has started."""
        self.watcher.kill()
        self.watcher.wait()
        kill_tree(self.head)
        self.folder.cleanup()

    def _config(self) -> dict[str, Any]:
        machines = {
            kind: {
                "resources": has | {f"kind:{kind}": 1, "object_store_memory": 100_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": MAX_OF_A_KIND,
            }
            for kind, has in KINDS.items()
        }
        head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
        commands = (
            *("initialization_commands", "setup_commands", "head_setup_commands"),
            *("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"),
            *("cluster_synced_files", "rsync_exclude", "rsync_filter"),
        )
        return {
            "cluster_name": "fake",
            "max_workers": MAX_OF_A_KIND * len(KINDS),
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": IDLE_SECONDS / 60,
            "provider": {
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider"
                ".FakeMultiNodeProvider",
                "gcs_address": f"127.0.0.1:{self.port}",
                "launch_multiple": True,
                "head_node_id": HEAD_ID,
            },
            "head_node_type": "ray.head.default",
            "available_node_types": {"ray.head.default": head, **machines},
            "file_mounts_sync_continuously": False,
            **{key: {} for key in ("auth", "docker", "file_mounts")},
            **{key: [] for key in commands},
        }


@dataclass(frozen=True)
class Growth:
    """What became of a run's machines."""

    samples: list[tuple[float, dict[str, int]]]
    ends: dict[str, float]
    """When each stage was done."""
    may_have: str
    """What the head alone said the cluster may have: GPUs, those of kind L4 and T4, and CPUs that
    bring none."""
    is_empty: bool
    """All machines but the head went afterwards."""

    def first(self, kind: str) -> float:
        """Return when the first machine of a kind was there."""
        return next(time for time, nodes in self.samples if nodes[kind])

    def last(self, kind: str) -> float:
        """Return when a machine of a kind was there for the last time."""
        return next(time for time, nodes in reversed(self.samples) if nodes[kind])

    def most(self) -> dict[str, int]:
        """Return how many machines of each kind there were at most."""
        return {kind: max(nodes[kind] for _, nodes in self.samples) for kind in KINDS}

    def describe(self) -> dict[str, object]:
        """Return when who came and went, in seconds from the start."""
        began = self.samples[0][0]
        seen = [kind for kind, number in self.most().items() if number]
        return {
            "most": self.most(),
            "came": {kind: round(self.first(kind) - began, 1) for kind in seen},
            "went": {kind: round(self.last(kind) - began, 1) for kind in seen},
            "stages done": {stage: round(end - began, 1) for stage, end in self.ends.items()},
            "all went": self.is_empty,
        }


COUNT_REACHABLE = """
from rayfuse.runtime.connect import join_cluster
join_cluster()
from rayfuse.runtime.resources import count_reachable, limit_cpu_tasks
reachable = [count_reachable("GPU", kind) for kind in (None, "L4", "T4")]
print(*reachable, limit_cpu_tasks())
"""

SETTINGS = (
    *("sources.0.accelerator_type=L4", "sources.0.min_actors=2"),
    *(
        "train.baseline=false",
        "train.num_workers=2",
        "train.gpus_per_worker=0",
        "train.accelerator_type=A100",
    ),
)


def run_and_watch(folder: Path) -> Growth:
    """Run a recipe from a head alone until all machines are gone again."""
    write_models_and_text(folder, 160)
    recipe = write_recipe(folder, "grows", str(folder / "storage"))
    cloud = FakeCloud(folder, {**os.environ, "HOME": str(folder), "DS_ACCELERATOR": "cpu"})
    try:
        may_have = cloud.ask(COUNT_REACHABLE)
        done = subprocess.run(
            [COMMAND, "run", str(recipe), *SETTINGS],
            env=cloud.env,
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        is_empty = cloud.wait_until_empty(6 * IDLE_SECONDS)
    finally:
        cloud.stop()
    layout = plan_layout(read_recipe(recipe, list(SETTINGS)), ALIGN_FACTS)
    return Growth(cloud.list_samples(), list_ends(layout), may_have, is_empty)


def list_ends(layout: Layout) -> dict[str, float]:
    """Return when each stage was done, by its last file."""
    (source,) = layout.captured.values()
    files = {
        "corpus": f"{layout.held_out.folder}/manifest.json",
        "capture": f"{source.folder}/manifest.json",
        "train": f"{layout.runs[0].folder}/done.json",
        "evaluate": layout.evaluation.scores["fused"],
    }
    return {
        stage: (Path(layout.store.root) / file).stat().st_mtime for stage, file in files.items()
    }
