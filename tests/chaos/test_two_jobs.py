"""Faults 11 and 30: two identical jobs at once."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.config.load import read_recipe
from rayfuse.run.layout import plan_layout
from rayfuse.storage.verify import verify_data_set
from tests.chaos.runs import COMMAND, IS_LONG, make_corpus, read_content, run_command, write_recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

ROUNDS = 10
"""In each half."""


def test_fault_11_30_two_identical_jobs_at_once_share_the_work(cluster, folder, calm_content):
    recipe = make_corpus(cluster, folder, "twice", str(folder / "storage-twice"))
    env = cluster.env | {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"}
    jobs = [
        subprocess.Popen(
            [COMMAND, "capture", str(recipe)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [job.communicate(timeout=400)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert run_command(cluster, "align", str(recipe)).returncode == 0
    assert read_content(recipe) == calm_content
    assert any("by another job" in text for text in outputs), outputs


JOB = """
import sys, time
from pathlib import Path
from rayfuse.config.load import read_recipe
from rayfuse.pipeline import prepare_run, run_stages

me, other = sys.argv[1:3]
for recipe in map(Path, sys.argv[3:]):
    recipe.with_suffix("." + me).touch()
    while not recipe.with_suffix("." + other).exists():
        time.sleep(0.01)
    notes = [""]
    record = lambda event: notes.append(event.note)
    settings = read_recipe(recipe)
    run_stages(settings, prepare_run(settings), ("capture",), record, lambda result: None)
    print("shared" if "shards by another job" in notes[-1] else "alone", flush=True)
"""


ANSWERS = ("shared", "alone")


@pytest.mark.skipif(not IS_LONG, reason="one round is in the short form; RAYFUSE_LONG_CHAOS=1")
@pytest.mark.parametrize("half", ["first", "second"])
def test_fault_11_30_in_twenty_rounds_two_identical_jobs_lose_and_duplicate_nothing(
    half, cluster, folder
):
    """Short rounds: both jobs keep their drivers, and one small source is captured."""
    calm = write_recipe(folder, f"calm-{half}", str(folder / f"storage-calm-{half}"))
    values = yaml.safe_load(calm.read_text())
    lines = (folder / "docs.jsonl").read_text().splitlines()[:120]
    (folder / "few.jsonl").write_text("\n".join(lines))
    values["corpus"] |= {"documents": str(folder / "few.jsonl"), "shard_tokens": 1_000}
    values["sources"] = values["sources"][:1]
    values["evaluate"] = {"documents": str(folder / "few.jsonl")}
    calm.write_text(yaml.safe_dump(values))
    for stage in ("corpus", "capture"):
        assert run_command(cluster, stage, str(calm)).returncode == 0
    expected = read_content(calm)
    recipes: list[Path] = []
    for round_ in range(ROUNDS):
        storage = folder / f"storage-{half}{round_}"
        shutil.copytree(folder / f"storage-calm-{half}" / "corpus", storage / "corpus")
        recipes.append(folder / f"{half}{round_}.yaml")
        recipes[-1].write_text(yaml.safe_dump(values | {"storage": str(storage)}))
    env = cluster.env | {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"}
    began = time.monotonic()
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", JOB, *names, *map(str, recipes)],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for names in (("a", "b"), ("b", "a"))
    ]
    # Ray prints lines of its own to stdout.
    answers = [
        [
            line == "shared"
            for line in job.communicate(timeout=1200)[0].splitlines()
            if line in ANSWERS
        ]
        for job in jobs
    ]
    seconds = time.monotonic() - began
    assert [job.returncode for job in jobs] == [0, 0]
    shared = 0
    for recipe, a, b in zip(recipes, *answers, strict=True):
        assert read_content(recipe) == expected
        layout = plan_layout(read_recipe(recipe), ALIGN_FACTS)
        assert not verify_data_set(layout.captured["llama"]).orphans
        shared += a or b
    print(f"{ROUNDS} rounds in {seconds:.0f} s; in {shared} both jobs made shards")
    assert shared > ROUNDS // 2
