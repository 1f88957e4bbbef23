"""`ray job submit` of jobs/run.py to a cluster started for it, from tokenizers made on the spot."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.fakes import (
    SAMPLE,
    byte_level_tokenizer,
    save_model,
    save_tokenizer,
    sentencepiece_tokenizer,
)

ROOT = Path(__file__).parents[1]

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ray_command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("ray")), *arguments]


@pytest.fixture
def cluster_env(tmp_path) -> Iterator[dict[str, str]]:
    """Start a head with a job server on loopback; end it, and only it, afterwards."""
    port, dashboard, agent = free_port(), free_port(), free_port()
    env = os.environ | {
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "DS_ACCELERATOR": "cpu",
    }
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
        env.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="rj", dir="/tmp") as short:
        head = subprocess.Popen(
            ray_command(
                *("start", "--head", "--block", f"--port={port}", "--num-cpus=6"),
                # The agent's usual port is another cluster's on this machine: jobs would not start.
                *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
                f"--temp-dir={short}",
                *("--object-store-memory=300000000", "--disable-usage-stats"),
                *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"),
            ),
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_for_port(dashboard)
            yield env
        finally:
            os.killpg(head.pid, signal.SIGTERM)
            head.wait(timeout=60)


def wait_for_port(port: int) -> None:
    for _ in range(240):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise TimeoutError(f"nothing listens on port {port}")


def write_recipe(folder: Path) -> Path:
    save_model("gpt_neox", 320, folder / "neox")
    save_tokenizer(byte_level_tokenizer(300), folder / "neox", bos="<|end|>", eos="<|end|>")
    save_model("llama", 330, folder / "target")
    save_tokenizer(sentencepiece_tokenizer(330), folder / "target", bos="<s>", eos="</s>")
    records = [{"id": f"d{i}", "text": SAMPLE[i % 4] * (2 + i % 3)} for i in range(40)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "docs.jsonl").write_text(lines)
    recipe = {
        "storage": str(folder / "storage"),
        "corpus": {"documents": str(folder / "docs.jsonl"), "max_tokens": 64, "shard_tokens": 500},
        "target": {"model": str(folder / "target")},
        "sources": [{"name": "neox", "model": str(folder / "neox")}],
        "train": {"rows_per_step": 16, "num_workers": 2},
        "evaluate": {"held_out_share": 0.3},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def submit(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ray_command("job", "submit", "--working-dir", str(ROOT), "--", "python", *arguments),
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_a_submitted_job_runs_every_stage_and_a_bad_recipe_fails_with_its_message(
    cluster_env, tmp_path
):
    recipe = write_recipe(tmp_path)
    result = submit(cluster_env, "jobs/run.py", str(recipe), "train.learning_rate=0.001")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "report    done in" in result.stdout
    findings = json.loads((tmp_path / "storage/report/findings.json").read_text())
    assert set(findings["bits_per_byte"]) == {"neox", "target", "clm", "fused"}
    assert findings["verdict"]["headline"] in result.stdout
    bad = submit(cluster_env, "jobs/run.py", str(recipe), "train.lamda=0.9")
    assert bad.returncode == 1
    assert "train.lamda is no setting of rayfuse; did you mean 'lambda'?" in bad.stdout
