"""Faults 1, 3 and 5: whatever is killed, whenever, the data sets come out byte for byte."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml

from rayfuse.layout import plan_layout
from rayfuse.recipe import read_recipe
from rayfuse.storage.verify import verify_data_set
from tests.fakes import byte_level_tokenizer, save_model, save_tokenizer
from tests.local_cluster import LocalCluster, kill_tree

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

SOURCES = {"llama": 330, "gpt_neox": 340, "gpt2": 350}
COMMAND = str(Path(sys.executable).with_name("rayfuse"))
LEAST_KILLS, MOST_KILLS = 20, 24
SECONDS = 900


@dataclass
class Chaos:
    """Kills something of a running capture at random moments."""

    cluster: LocalCluster
    recipe: Path
    seed: int
    kills: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
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
        """Break things until enough is broken, then let the run end."""
        began = time.monotonic()
        while time.monotonic() - began < SECONDS:
            time.sleep(self.random.uniform(0.2, 3.0))
            code = self.driver.poll()
            if code == 0:
                return
            if code is not None:  # it gave up, as a run may whose nodes go away: type it again
                self.driver = self.start_driver()
                continue
            if len(self.kills) < MOST_KILLS and self.cluster.find_workers("MapWorker"):
                kill = self.random.choices(
                    [self.kill_actor, self.kill_node, self.kill_driver], [6, 1, 1]
                )[0]
                kill()
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


def write_models_and_text(folder: Path) -> None:
    """Write three models and text for some twenty shards."""
    words = "the cat sat on a mat, dogs look while 42 boxes add up to (x + y) * z"
    for family, vocab in SOURCES.items():
        save_model(family, vocab, folder / family)
        tokenizer = byte_level_tokenizer(vocab - 20)
        save_tokenizer(tokenizer, folder / family, bos="<|end|>", eos="<|end|>")
    choose = random.Random(7)
    with open(folder / "docs.jsonl", "w") as out:
        for i in range(720):
            text = " ".join(choose.choices(words.split(), k=choose.randint(40, 400)))
            out.write(json.dumps({"id": f"d{i}", "text": text}) + "\n")


def write_recipe(folder: Path, name: str, storage: str) -> Path:
    recipe = {
        "storage": storage,
        "corpus": {
            "documents": str(folder / "docs.jsonl"),
            "max_tokens": 256,
            "shard_tokens": 8_000,
        },
        "target": {"model": str(folder / "llama")},
        "sources": [{"name": family, "model": str(folder / family)} for family in SOURCES],
        "capture": {"batch_tokens": 512},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def read_content(recipe: Path) -> dict[str, dict[int, tuple[str, bytes]]]:
    """Return the bytes of every shard and of its rejects, by data set."""
    layout = plan_layout(read_recipe(recipe))
    found: dict[str, dict[int, tuple[str, bytes]]] = {}
    for data in (*layout.captured.values(), *layout.aligned.values()):
        assert not verify_data_set(data, layout.corpus).damages
        found[data.folder] = {
            shard: (commit.sha256, data.store.read(f"{data.folder}/{commit.file}"))
            for shard, commit in data.commits().items()
        }
    return found


@pytest.fixture
def cluster(tmp_path) -> Iterator[LocalCluster]:
    cluster = LocalCluster(tmp_path, num_cpus=3)
    yield cluster
    cluster.stop()


def run_command(cluster: LocalCluster, *arguments: str) -> None:
    env = cluster.env | {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"}
    subprocess.run([COMMAND, *arguments], env=env, check=True, timeout=600)


def check_chaos(cluster: LocalCluster, folder: Path, storage: str, seed: int) -> Chaos:
    """Run the same capture undisturbed and in chaos, and compare every byte."""
    write_models_and_text(folder)
    calm = write_recipe(folder, "calm", str(folder / "storage-calm"))
    run_command(cluster, "corpus", str(calm))
    run_command(cluster, "capture", str(calm))
    disturbed = write_recipe(folder, "chaos", storage)
    run_command(cluster, "corpus", str(disturbed))
    began = time.monotonic()
    chaos = Chaos(cluster, disturbed, seed)
    try:
        chaos.run()
    finally:
        kill_tree(chaos.driver)
    seconds = time.monotonic() - began
    print(f"seed {seed}: {len(chaos.kills)} kills in {seconds:.0f} s: {', '.join(chaos.kills)}")
    run_command(cluster, "align", str(disturbed))  # what was captured by a driver that died then
    expected, found = read_content(calm), read_content(disturbed)
    assert found == expected
    assert all(len(shards) > 15 for shards in found.values())
    assert len(chaos.kills) >= LEAST_KILLS
    assert {"actor", "node", "driver"} <= set(chaos.kills)
    return chaos


def test_fault_1_3_5_killing_anything_changes_no_byte_on_a_local_disk(cluster, tmp_path):
    check_chaos(cluster, tmp_path, str(tmp_path / "storage-chaos"), seed=1)
