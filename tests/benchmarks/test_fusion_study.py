"""The fusion study as a command: it resumes after any interruption."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def run_study(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.fusion", "--scale", "tiny", "--out", str(out),
         "--seeds", "1", "--questions", "2", "--workers", "1", *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip


@pytest.fixture(scope="module")
def study(shared_data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("study")
    done = run_study(out)
    assert done.returncode == 0, done.stderr
    return out


def records_of(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.glob("units/*/result.json")}


def test_an_interrupted_study_computes_only_missing_units(study):
    before = records_of(study)
    stopped = next(path for path in before if path.parent.name.startswith("train"))
    scores = json.loads(stopped.read_text())["nats"]
    stopped.unlink()
    done = run_study(study)
    assert done.returncode == 0, done.stderr
    assert "1/1 train" in done.stdout
    after = records_of(study)
    assert {path for path in after if before[path] != after[path]} == {stopped}
    assert json.loads(stopped.read_text())["nats"] == scores


def test_a_partial_study_is_reported_as_partial(study):
    text = (study / "RESULTS.md").read_text()
    assert "**Partial:" in text
    assert "CLM needs" in text
    numbers = json.loads((study / "numbers.json").read_text())
    assert set(numbers["questions"]["2"]) == {"CLM", "fused", "CLM 2x"}
    assert (study / "tokens.png").read_bytes().startswith(b"\x89PNG")
