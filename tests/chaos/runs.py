"""Captures as a user starts them, on a cluster that tests inject faults into."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import yaml

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.config.load import read_recipe
from rayfuse.run.layout import plan_layout
from rayfuse.storage.verify import verify_data_set
from tests.fakes import byte_level_tokenizer, save_model, save_tokenizer
from tests.local_cluster import LocalCluster

COMMAND = str(Path(sys.executable).with_name("rayfuse"))
IS_LONG = bool(os.environ.get("RAYFUSE_LONG_CHAOS"))
"""The long form: three sources, 24 kills, 20 rounds of two jobs, stalls of 30 s; an hour."""

SOURCES = {"llama": 330, "gpt_neox": 340} | ({"gpt2": 350} if IS_LONG else {})
NUM_DOCUMENTS, MIN_SHARDS = (720, 15) if IS_LONG else (400, 8)

Content = dict[str, dict[int, tuple[str, bytes]]]
"""The bytes of every shard, by data set and shard."""


def write_models_and_text(folder: Path) -> None:
    """Write the models, and text for ten or twenty shards."""
    words = "the cat sat on a mat, dogs look while 42 boxes add up to (x + y) * z"
    for family, vocab in SOURCES.items():
        save_model(family, vocab, folder / family)
        tokenizer = byte_level_tokenizer(vocab - 20)
        save_tokenizer(tokenizer, folder / family, bos="<|end|>", eos="<|end|>")
    choose = random.Random(7)
    with open(folder / "docs.jsonl", "w") as out:
        for i in range(NUM_DOCUMENTS):
            text = " ".join(choose.choices(words.split(), k=choose.randint(40, 400)))
            out.write(json.dumps({"id": f"d{i}", "text": text}) + "\n")


def write_recipe(folder: Path, name: str, storage: str, **source: object) -> Path:
    recipe = {
        "storage": storage,
        "corpus": {
            "documents": str(folder / "docs.jsonl"),
            "max_tokens": 256,
            "shard_tokens": 8_000,
        },
        "target": {"model": str(folder / "llama")},
        "sources": [
            {"name": family, "model": str(folder / family), **source} for family in SOURCES
        ],
        "capture": {"batch_tokens": 512},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def read_content(recipe: Path) -> Content:
    """Read every shard of every source, after verifying it."""
    layout = plan_layout(read_recipe(recipe), ALIGN_FACTS)
    found: Content = {}
    for data in (*layout.captured.values(), *layout.aligned.values()):
        assert not verify_data_set(data).corrupt
        found[data.folder] = {
            shard: (commit.sha256, data.store.read(f"{data.folder}/{commit.file}"))
            for shard, commit in data.commits().items()
        }
    return found


def run_command(cluster: LocalCluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = cluster.env | {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"}
    return subprocess.run(
        [COMMAND, *arguments], env=env, capture_output=True, text=True, timeout=600, check=False
    )


def make_corpus(
    cluster: LocalCluster, folder: Path, name: str, storage: str, **source: object
) -> Path:
    recipe = write_recipe(folder, name, storage, **source)
    result = run_command(cluster, "corpus", str(recipe))
    assert result.returncode == 0, result.stdout + result.stderr
    return recipe


def start_capture(
    cluster: LocalCluster, recipe: Path, *, is_own: bool = False
) -> subprocess.Popen[str]:
    """Start a capture, and wait until something of it is committed.

    Args:
        cluster: The cluster that runs it.
        recipe: The recipe file.
        is_own: Let the driver start a cluster of its own instead.
    """
    env = cluster.env | ({} if is_own else {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"})
    driver = subprocess.Popen(
        [COMMAND, "capture", str(recipe)], env=env, stderr=subprocess.PIPE, text=True
    )
    layout = plan_layout(read_recipe(recipe), ALIGN_FACTS)
    while not any(data.list_committed() for data in layout.captured.values()):
        assert driver.poll() is None
        time.sleep(0.2)
    return driver
