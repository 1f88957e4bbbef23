"""The benchmark for GPUs: its dry run, its time budget, and measurements that fail, die or hang.

Only light modules are imported here, since the child process imports this file for its faults.
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.__main__ import append_row, format_table
from benchmarks.gpu.measurements import list_measurements
from benchmarks.gpu.session import Measurement, Row, UnavailableError, measure_all

ROOT = Path(__file__).parents[2]
NEEDS_A_GPU = ("liger", "flash_attention_2", "flex_attention")


def run_benchmark(*options: str, first_on_path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run", *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{first_on_path}:{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> tuple[dict[str, Row], str]:
    """Run all measurements on a CPU once, without Ray; rows by name, and the table."""
    folder = tmp_path_factory.mktemp("gpu")
    out = folder / "rows.jsonl"
    (folder / "ray.py").write_text("raise ImportError('Ray is not installed')")
    done = run_benchmark("--out", str(out), first_on_path=folder)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return {row["measurement"]: row for row in rows}, done.stdout


def test_a_dry_run_measures_all_but_what_needs_a_gpu(dry_run):
    rows, table = dry_run
    assert list(rows) == [measurement.name for measurement in list_measurements(is_dry=True)]
    for name, row in rows.items():
        expected = "skipped" if any(part in name for part in NEEDS_A_GPU) else "measured"
        assert row["status"] == expected, row
        assert name in table


def test_every_number_is_finite_and_every_time_and_ratio_is_above_0(dry_run):
    numbers = {
        (name, key): value
        for name, row in dry_run[0].items()
        for key, value in row.get("values", {}).items()
        if isinstance(value, int | float)
    }
    assert len(numbers) > 100
    for (name, key), value in numbers.items():
        assert math.isfinite(value), (name, key)
        signs = ("ratio", "seconds", "per_second", "speed", "mib", "weights", "share", "tokens")
        if any(sign in key for sign in signs) and key != "top_k_share":  # a difference of times
            assert 0 < value < 1e9, (name, key)


def values_of(dry_run: tuple[dict[str, Row], str], start: str) -> dict[str, dict[str, Any]]:
    found = {
        name: row["values"]
        for name, row in dry_run[0].items()
        if name.startswith(start) and row["status"] == "measured"
    }
    assert found
    return found


def test_the_wide_product_is_far_more_exact_and_gradients_are_as_exact_as_their_dtype(dry_run):
    for values in values_of(dry_run, "product").values():
        for key, value in values.items():
            if "error" in key and key.startswith("float32"):
                assert value < values[key.replace("float32", "bfloat16")] / 100
    (errors,) = values_of(dry_run, "gradients").values()
    assert errors["loss_error"] < 1e-5
    assert 1e-4 < errors["hidden_gradient_error"] < 0.01
    assert 1e-4 < errors["weight_gradient_error"] < 0.01


def test_the_loss_takes_less_memory_than_full_logits(dry_run):
    for name, values in values_of(dry_run, "loss over").items():
        assert values["memory_ratio"] < (0.6 if "dense" in name else 0.9), name


def test_both_engines_train_alike_and_lora_trains_less(dry_run):
    found = values_of(dry_run, "training")
    for kind in ("llama-1.1b", "llama-7b, LoRA"):
        torch, deepspeed = (found[f"training, {kind}, {name}"] for name in ("torch", "deepspeed"))
        assert torch["loss"] == pytest.approx(deepspeed["loss"], abs=1e-3)
        assert torch["weights"] == deepspeed["weights"]
        is_lora = "LoRA" in kind
        assert (torch["trained_weights"] < torch["weights"] / 2) == is_lora


def test_packed_rows_and_a_spread_model_give_the_same_numbers(dry_run):
    (packed,) = values_of(dry_run, "packed").values()
    assert packed["keeps_rows_apart"] and packed["largest_difference"] < 1e-4
    assert any("attention" in kernel for kernel in packed["kernels"])
    (spread,) = values_of(dry_run, "capture, two devices").values()
    assert spread["largest_difference_nats"] < 1e-5


def succeed() -> dict[str, float]:
    return {"value": 1.0}


def fail() -> dict[str, float]:
    raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB\nsecond line")


def die() -> dict[str, float]:
    os._exit(7)


def hang() -> dict[str, float]:
    time.sleep(600)
    return {}


def lack() -> dict[str, float]:
    raise UnavailableError("there is one GPU, not 2")


def count_lines(path: str) -> dict[str, float]:
    return {"lines": len(Path(path).read_text().splitlines())}


def read_process() -> dict[str, float]:
    return {"process": os.getpid()}


def of(function: str, **settings: Any) -> Measurement:
    return Measurement(function, f"tests.benchmarks.test_gpu:{function}", settings)


def test_a_measurement_that_fails_dies_or_is_unavailable_ends_no_other(tmp_path):
    out = tmp_path / "rows.jsonl"
    names = ["read_process", "lack", "read_process", "fail", "read_process", "die", "succeed"]
    chosen = [*map(of, names), of("count_lines", path=str(out))]
    with out.open("w") as file:
        rows = measure_all(chosen, seconds=300, record=lambda row: append_row(file, row))
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    status = [row["status"] for row in rows]
    assert status == [
        *("measured", "skipped", "measured", "failed", "measured", "failed"),
        *("measured", "measured"),
    ]
    assert rows[1]["reason"] == "there is one GPU, not 2"
    assert rows[3]["reason"] == "RuntimeError: CUDA out of memory. Tried to allocate 20 GiB"
    assert "in fail" in rows[3]["traceback"]
    assert rows[5]["reason"] == "the process ended with exit code 7"
    before, between, after = (rows[at]["values"]["process"] for at in (0, 2, 4))
    assert before == between != after  # a failure may have broken its process
    assert rows[7]["values"]["lines"] == 7  # each row is on disk before the next measurement
    assert rows[3]["reason"] in format_table(rows)


def test_a_hanging_measurement_is_stopped_and_those_beyond_the_budget_are_skipped():
    began = time.monotonic()
    limited = Measurement("limited", "tests.benchmarks.test_gpu:hang", {}, max_seconds=1.5)
    rows = measure_all([limited, of("hang"), of("succeed")], seconds=4, record=lambda row: None)
    assert time.monotonic() - began < 60
    assert [row["status"] for row in rows] == ["failed", "skipped", "skipped"]
    assert rows[0]["reason"] == "stopped after 2 s"
    assert rows[1]["reason"] == "stopped at the end of the time budget"
    assert rows[2]["reason"] == "the time budget is used up"


def test_without_time_all_is_listed_as_skipped(tmp_path):
    out = tmp_path / "rows.jsonl"
    done = run_benchmark("--minutes", "0", "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["measurement"] for row in rows] == [
        measurement.name for measurement in list_measurements(is_dry=True)
    ]
    assert {row["status"] for row in rows} == {"skipped"}
    assert done.stdout.count("the time budget is used up") == len(rows)
