"""Faults 1, 3, 4, 5, 7, 8, 11 and 15 in training: the curve is that of a calm run."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
import yaml

from tests.local_cluster import LocalCluster
from tests.s3 import Rule
from tests.small_run import write_recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

COMMAND = str(Path(sys.executable).with_name("rayfuse"))
IS_LONG = bool(os.environ.get("RAYFUSE_LONG_CHAOS"))
only_long = pytest.mark.skipif(not IS_LONG, reason="a minute or more; RAYFUSE_LONG_CHAOS=1")
SEEDS = [1, 2, 3] if IS_LONG else [1]
STEADY = [
    *("train.baseline=false", "train.epochs=20", "train.checkpoint_every_steps=5"),
    *("train.validate_every_steps=5", "train.learning_rate=0.002"),
]
SETTINGS = [*STEADY, "train.publish=best", "train.patience=4"]
NUM_STEPS = 160
"""Of 20 epochs."""


@pytest.fixture(scope="module")
def cluster(s3_proxy, tmp_path_factory) -> Iterator[LocalCluster]:
    """A head that knows the S3 server, since that was started before it."""
    cluster = LocalCluster(tmp_path_factory.mktemp("home"), num_cpus=4)
    yield cluster
    cluster.stop()


def start(cluster: LocalCluster, stage: str, recipe: Path, *settings: str) -> subprocess.Popen[str]:
    env = cluster.env | {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"}
    return subprocess.Popen(
        [COMMAND, stage, str(recipe), *settings],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output[-4000:]
    return output


@pytest.fixture(scope="module")
def captured(cluster, tmp_path_factory) -> Path:
    """A recipe's folder with everything that training needs."""
    folder = tmp_path_factory.mktemp("captured")
    recipe = write_recipe(folder)
    hold_out_other_text(recipe)
    for stage in ("corpus", "capture"):
        finish(start(cluster, stage, recipe))
    return folder


def hold_out_other_text(recipe: Path) -> None:
    """Evaluate on random text, on which training is soon past its best."""
    draw = random.Random(3)
    letters = "The cat sat 0123456789 +=*#@ zqxj\n"
    records = [{"id": f"o{i}", "text": "".join(draw.choices(letters, k=300))} for i in range(12)]
    path = recipe.with_name("other.jsonl")
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    content = yaml.safe_load(recipe.read_text())
    content["evaluate"] = {"documents": str(path)}
    recipe.write_text(yaml.safe_dump(content))


def make_storage(captured: Path, name: str) -> str:
    shutil.copytree(captured / "storage", captured / name)
    return f"storage={captured / name}"


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    times = {"seconds", "wait_seconds", "tokens_per_second", "flops_per_second", "memory_gib"}
    return {name: value for name, value in record.items() if name not in times}


def read_run(folder: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Return the metrics without times, and the model's files."""
    (folder,) = (folder / "train").iterdir()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    files = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}
    return [without_times(json.loads(line)) for line in lines], files


@pytest.fixture(scope="module")
def calm(cluster, captured) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    finish(
        start(cluster, "train", captured / "recipe.yaml", make_storage(captured, "calm"), *SETTINGS)
    )
    (done,) = (captured / "calm/train").glob("*/done.json")
    record = json.loads(done.read_text())
    # It ends before the last step, and publishes the weights of an earlier one.
    assert record["published_step"] < record["steps"] < NUM_STEPS
    return read_run(captured / "calm")


def wait_for_checkpoint(captured: Path, name: str, process: subprocess.Popen[str]) -> None:
    while not list((captured / name).glob("train/*/checkpoints/records/*-[01].json")):
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.1)


@pytest.mark.parametrize("seed", SEEDS)
def test_fault_1_a_killed_worker_changes_no_bit_of_the_curve_or_the_model(
    seed, cluster, captured, calm
):
    name = f"worker{seed}"
    storage = make_storage(captured, name)
    process = start(cluster, "train", captured / "recipe.yaml", storage, *SETTINGS)
    wait_for_checkpoint(captured, name, process)
    chance = random.Random(seed)
    time.sleep(chance.uniform(0, 2))
    chance.choice(cluster.find_workers("RayTrainWorker")).kill()
    output = finish(process)
    assert "resuming from the checkpoint of step" in output
    assert read_run(captured / name) == calm


def test_fault_5_a_killed_driver_changes_no_bit_either(cluster, captured, calm):
    storage = make_storage(captured, "driver")
    process = start(cluster, "train", captured / "recipe.yaml", storage, *SETTINGS)
    wait_for_checkpoint(captured, "driver", process)
    process.kill()
    process.communicate()
    output = finish(start(cluster, "train", captured / "recipe.yaml", storage, *SETTINGS))
    assert "resuming from the checkpoint of step" in output
    assert read_run(captured / "driver") == calm


FAULTS = ["500", "503", "slowdown", "reset", "lost_reply", "truncate", "stall:2"]


def put_on_s3(captured: Path, s3_root: str) -> str:
    s3fs.S3FileSystem().put(f"{captured / 'storage'}/", s3_root, recursive=True)
    return f"storage={s3_root}"


def read_run_on_s3(s3_root: str, folder: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    s3fs.S3FileSystem().get(f"{s3_root}/train/", f"{folder}/train/", recursive=True)
    return read_run(folder)


@only_long  # the next one has such requests, too
def test_fault_7_on_s3_where_one_request_in_twenty_fails_nothing_changes(
    cluster, captured, calm, s3_root, s3_proxy, tmp_path
):
    storage = put_on_s3(captured, s3_root)
    s3_proxy.share, s3_proxy.kinds = 0.05, FAULTS
    finish(start(cluster, "train", captured / "recipe.yaml", storage, *SETTINGS))
    s3_proxy.heal()
    assert read_run_on_s3(s3_root, tmp_path) == calm
    assert sum(done is not None for _, _, done in s3_proxy.log) > 5


@only_long  # how an incomplete checkpoint is handled: test_checkpoint.py
def test_fault_7_8_an_incomplete_checkpoint_on_bad_s3_is_not_used_and_reported(
    cluster, captured, calm, s3_root, s3_proxy, tmp_path
):
    storage = put_on_s3(captured, s3_root)
    s3_proxy.share, s3_proxy.kinds = 0.05, FAULTS
    cut = "checkpoints/step_00000010"
    s3_proxy.rules = [Rule("reset", method, cut, math.inf) for method in ("PUT", "POST")]
    settings = [storage, "storage_retry_seconds=12", *SETTINGS]
    process = start(cluster, "train", captured / "recipe.yaml", *settings)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    assert f"storage {s3_root} has failed for" in output
    assert "run the same command again once the storage is back" in output
    s3_proxy.rules = []
    output = finish(start(cluster, "train", captured / "recipe.yaml", storage, *SETTINGS))
    assert "resuming from the checkpoint of step 5; a later checkpoint is incomplete" in output
    s3_proxy.heal()
    assert read_run_on_s3(s3_root, tmp_path) == calm
    assert sum(done is not None for _, _, done in s3_proxy.log) > 5


@only_long
def test_fault_11_two_identical_jobs_train_once_and_the_second_names_the_first(
    cluster, captured, calm
):
    settings = ["train", captured / "recipe.yaml", make_storage(captured, "twice"), *SETTINGS]
    jobs = [start(cluster, *settings) for _ in range(2)]
    output = [finish(job) for job in jobs]
    waited = ["trains this run already; this job waits" in text for text in output]
    assert sorted(waited) == [False, True]
    assert f"process {jobs[waited.index(False)].pid} of" in output[waited.index(True)]
    assert read_run(captured / "twice") == calm


NARROW = """
import torch
from transformers import LlamaForCausalLM

class Narrow(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.register_forward_pre_hook(refuse, with_kwargs=True)

def refuse(module, args, kwargs):
    if module.training and len(kwargs["input_ids"]) > {most}:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
"""


def start_narrow(cluster: LocalCluster, captured: Path, most: int) -> subprocess.Popen[str]:
    """Train a target with memory for only so many sequences per micro-batch."""
    folder = captured / f"narrow{most}"
    shutil.copytree(captured / "target", folder)
    (folder / "narrow.py").write_text(NARROW.format(most=most))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "narrow.Narrow"}
    (folder / "config.json").write_text(json.dumps(config))
    settings = [f"target.model={folder}", "target.trust_remote_code=true"]
    settings += [make_storage(captured, f"storage-narrow{most}"), "train.micro_batch_sequences=8"]
    return start(cluster, "train", captured / "recipe.yaml", *settings, *SETTINGS)


@only_long
def test_fault_15_micro_batches_that_do_not_fit_the_memory_are_halved(cluster, captured, calm):
    output = finish(start_narrow(cluster, captured, 2))
    for sequences in (8, 4):
        assert f"out of memory with {sequences} sequences per micro-batch" in output
    assert "out of memory with 2 sequences" not in output
    found, _ = read_run(captured / "storage-narrow2")
    assert [record["batch_id"] for record in found] == [record["batch_id"] for record in calm[0]]


@only_long
def test_fault_15_one_sequence_beyond_the_memory_stops_the_run_with_a_remedy(cluster, captured):
    process = start_narrow(cluster, captured, 0)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 2  # the recipe needs more memory than this machine has
    assert "out of memory with micro-batches of one sequence; lower train.sequence_tokens" in output


def wait_until(is_true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 300
    while not is_true():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < until
        time.sleep(0.5)


@only_long
def test_fault_4_a_preemption_notice_saves_a_checkpoint_and_no_step_is_repeated(tmp_path):
    recipe = write_recipe(tmp_path)
    head = LocalCluster(tmp_path, num_cpus=1)
    try:
        there = head.list_nodes()
        node = head.add_node(num_cpus=1)
        for stage in ("corpus", "capture"):
            finish(start(head, stage, recipe))
        (node_id,) = head.list_nodes() - there
        settings = [*STEADY, "train.min_workers=1", "train.max_failures=0", "train.epochs=100"]
        settings += ["train.checkpoint_every_steps=100000"]  # none but for the notice
        process = start(head, "train", recipe, make_storage(tmp_path, "spot"), *settings)
        wait_until(lambda: bool(head.find_workers("RayTrainWorker")), process)
        time.sleep(15)  # some steps
        head.drain_node(node_id, seconds=20)
        wait_for_checkpoint(tmp_path, "spot", process)
        time.sleep(20)
        head.kill_node(node)
        output = finish(process)
    finally:
        head.stop()
    assert "a node is about to be preempted: saving a checkpoint" in output
    found, _ = read_run(tmp_path / "spot")
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    saved = sum(record["num_workers"] == 2 for record in found)
    assert saved > 0
    assert f"resuming from the checkpoint of step {saved} (of 2 workers)" in output
    assert {record["num_workers"] for record in found[saved:]} == {1}


@only_long
def test_fault_3_two_workers_become_one_and_two_again_on_the_same_batches(tmp_path):
    recipe = write_recipe(tmp_path)
    head = LocalCluster(tmp_path, num_cpus=1)
    try:
        node = head.add_node(num_cpus=1)
        for stage in ("corpus", "capture"):
            finish(start(head, stage, recipe))
        # Other workers add up in another order. A model that learns its text by heart makes of a
        # difference of 1e-8 one of 1e-2 in 300 steps at the other tests' rate of 0.001; here it
        # stays one of 1e-7 (LOG.md).
        settings = [*STEADY, "train.min_workers=1", "train.epochs=200", "train.rows_per_step=40"]
        settings += ["train.checkpoint_every_steps=10", "train.learning_rate=0.0001"]
        finish(start(head, "train", recipe, make_storage(tmp_path, "calm"), *settings))
        process = start(head, "train", recipe, make_storage(tmp_path, "elastic"), *settings)
        wait_for_checkpoint(tmp_path, "elastic", process)
        head.kill_node(node)
        metrics = next((tmp_path / "elastic/train").iterdir()) / "metrics.jsonl"

        def last_workers() -> int:
            return json.loads(metrics.read_text().splitlines()[-1])["num_workers"]

        wait_until(lambda: last_workers() == 1, process)
        head.add_node(num_cpus=1)
        wait_until(lambda: last_workers() == 2, process)
        finish(process)
    finally:
        head.stop()
    expected, _ = read_run(tmp_path / "calm")
    found, _ = read_run(tmp_path / "elastic")
    assert [record["batch_id"] for record in found] == [record["batch_id"] for record in expected]
    assert {record["num_workers"] for record in found} == {1, 2}
    differences = [
        abs(ours["loss"] / theirs["loss"] - 1) for ours, theirs in zip(found, expected, strict=True)
    ]
    print(
        f"losses from {expected[0]['loss']:.3f} to {expected[-1]['loss']:.3f}, at most "
        f"{max(differences):.1e} apart"
    )
    assert max(differences) < 1e-4
