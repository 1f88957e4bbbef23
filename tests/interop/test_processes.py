"""Two processes that read one run: every row once, resumed in the middle; and losses of our own."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rayfuse
from tests.chaos.runs import IS_LONG
from tests.interop.other_trainers import train_own
from tests.interop.reader_process import NUM_BATCHES, NUM_WORKERS, load
from tests.stored_run import write_run

pytestmark = pytest.mark.xdist_group("processes")

NUM_PROCESSES = 2
TRAINERS = {"trainer_losses": "transformers", "lightning_losses": "lightning", "sft_losses": "trl"}
"""Where the page keeps the losses of each trainer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("processes")
    write_run(root)
    return root


def start(module: str, *arguments: str) -> None:
    """Run a module in two processes, and wait for them."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", str(NUM_PROCESSES), "-m", module, *arguments]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def seen(folder) -> list[dict[str, Any]]:
    """The losses and batches of each process that trains."""
    start("tests.interop.trainer_process", str(folder))
    return [
        json.loads((folder / f"process-{rank}.json").read_text()) for rank in range(NUM_PROCESSES)
    ]


@pytest.mark.slow
@pytest.mark.skipif(
    not IS_LONG, reason="minutes; in one process it always runs; RAYFUSE_LONG_CHAOS=1"
)
@pytest.mark.parametrize("name", TRAINERS)
def test_losses_of_two_processes_are_those_of_our_own_trainer(name, seen, folder, process_group):
    pytest.importorskip(TRAINERS[name])
    rows = {row["row_id"]: row for row in rayfuse.open_dataset(folder / "storage")}
    parts = [process[name]["batches"] for process in seen]
    batches = [[rows[key] for part in step for key in part] for step in zip(*parts, strict=True)]
    given = [row["row_id"] for batch in batches for row in batch]
    assert len(given) == len(set(given)), "a row was given twice"
    losses = train_own(folder, batches, rate=1e-3)
    assert len(set(losses)) == len(losses) == 4
    for process in seen:
        np.testing.assert_allclose(process[name]["losses"], losses, rtol=0, atol=1e-6)


def test_two_processes_of_two_workers_read_each_row_once_and_resume_with_the_same_rest(folder):
    start("tests.interop.reader_process", str(folder))
    found: Counter[str] = Counter()
    for rank in range(NUM_PROCESSES):
        read = json.loads((folder / f"read-{rank}.json").read_text())
        undisturbed = [batch[:2] for batch in load(folder / "storage", rank, NUM_PROCESSES)]
        assert len(read["before"]) == NUM_BATCHES < len(undisturbed)
        assert read["after"], f"process {rank} had read everything before it stopped"
        for worker in range(NUM_WORKERS):
            resumed = [names for of, names in read["before"] + read["after"] if of == worker]
            assert resumed == [names for of, names in undisturbed if of == worker]
        found.update(name for _, names in read["before"] + read["after"] for name in names)
    assert found == Counter(row["row_id"] for row in rayfuse.open_dataset(folder / "storage"))
