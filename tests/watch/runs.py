"""Runs for the page, made in the store: logs, workers, a training, and very many shards."""

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rayfuse.capture.workers import WorkerReport, WorkerState
from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.run.layout import Layout
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.manifest import Commit
from rayfuse.storage.seal import seal
from rayfuse.train.live import TrainWorker, write_workers

SOURCES = ("neox", "gpt2")


def write_capture_log(data: DataSet, **changes: Any) -> None:
    """Write a metrics.jsonl of two lines; the last one is a minute old."""
    line = {
        "time": time.time() - 60,
        "source": data.name,
        "shards_done": 2,
        "num_shards": 4,
        "tokens_per_second": 1234.0,
        "workers": 1,
        "seconds_left": 600.0,
        "dollars": None,
    } | changes
    lines = [seal(line | {"time": line["time"] - 15}, indent=None), seal(line, indent=None)]
    data.store.write(f"{data.folder}/metrics.jsonl", b"\n".join(lines) + b"\n")


def write_report(data: DataSet, worker: WorkerState, age_seconds: float = 5.0) -> None:
    """Write what the workers of a job report."""
    report = asdict(WorkerReport(time.time() - age_seconds, [worker]))
    data.store.write(f"{data.folder}/workers/job.json", seal(report))


def make_step(step: int, *, is_fused: bool = True, **changes: Any) -> dict[str, Any]:
    """Make a line of a training's metrics.jsonl."""
    return {
        "step": step,
        "is_skipped": False,
        "loss": 3.0 / step,
        "clm_loss": 4.0 / step,
        "fusion_loss": 2.0 / step if is_fused else None,
        "source_losses": {},
        "source_shares": {"neox": 0.25, "gpt2": 0.75} if is_fused else {},
        "tokens": 1000 * step,
        "clm_weight": 0.3,
        "learning_rate": 0.001,
        "seconds": 2.0,
        "wait_seconds": 0.0,
        "tokens_per_second": 500.0,
        "num_workers": 2,
    } | changes


def write_training(layout: Layout, num_steps: int, *, outlier_at: int | None = None) -> None:
    """Write the steps, the workers and the lease of both trainings."""
    store = layout.store
    for run in layout.runs:
        steps = [make_step(step, is_fused=run.is_fused) for step in range(1, num_steps + 1)]
        steps[-1]["bits_per_byte"] = 1.5
        if outlier_at is not None:
            steps[outlier_at]["clm_loss"] = 1e9
        lines = "".join(json.dumps(step) + "\n" for step in steps)
        store.write(f"{run.folder}/metrics.jsonl", lines.encode())
        write_workers(store, run.folder, [TrainWorker(0, "node-7", 4242, ["5"])])
        lease = {"job": "a", "host": "node-1", "pid": 77, "renewals": 3}
        store.write(f"{run.folder}/lease.json", json.dumps(lease).encode())


def make_commit(shard: int) -> Commit:
    """Make a shard's record; its file is empty."""
    attempt = f"{shard:012x}"
    return Commit(
        shard=shard,
        file=f"data/{shard:05d}-{attempt}.parquet",
        num_bytes=0,
        sha256=hashlib.sha256(b"").hexdigest(),
        rows=500,
        tokens=100_000,
        rejects=0,
        attempt=attempt,
        stats={"began": 1.7e9 + shard, "busy_seconds": 9.0, "idle_seconds": 1.0},
        worker=f"node-{shard % 64}-{100 + shard % 64}-abcdef",
        inputs={"corpus": hashlib.sha256(b"").hexdigest()},
    )


def write_many_shards(recipe: Recipe, layout: Layout, num_shards: int) -> None:
    """Write a complete corpus, and a source that lacks one shard; past the store, for speed."""
    commits = [make_commit(shard) for shard in range(num_shards)]
    records = [seal(asdict(commit)) for commit in commits]
    layout.corpus.claim({"recipe": dump_recipe(recipe)})
    layout.corpus.write_manifest(commits, layout.corpus.read_run())
    files = Path(layout.corpus.store.root, layout.corpus.folder)
    (files / "data").mkdir()
    for commit in commits:
        (files / commit.file).touch()
    data = layout.captured["neox"]
    folder = Path(data.store.root, data.folder, "commits")
    folder.mkdir(parents=True)
    for shard, record in enumerate(records[:-1]):
        (folder / f"{shard:05d}.json").write_bytes(record)
