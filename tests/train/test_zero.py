import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]


def train_in_processes(
    num_workers: int, stages: list[str], folder: Path, start: int = 0
) -> dict[str, list[float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    out = folder / f"losses-{num_workers}.json"
    env = os.environ | {"PYTHONPATH": str(ROOT), "MODEL_FOLDER": str(folder)}
    script = str(ROOT / "tests/train/zero_worker.py")
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                script,
                str(rank),
                str(num_workers),
                port,
                str(out),
                str(start),
                *stages,
            ],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_workers)
    ]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), "\n".join(outputs)[-4000:]
    return json.loads(out.read_text())


@pytest.mark.timeout(600)
def test_every_zero_stage_on_two_workers_trains_like_one_process_and_goes_on_with_one(tmp_path):
    alone = train_in_processes(1, ["0"], tmp_path)
    together = train_in_processes(2, ["0", "1", "2", "3"], tmp_path)
    for family in ("llama", "gpt2"):
        expected = alone[f"{family}-0"]
        assert len(set(expected)) == len(expected)
        for stage in ("0", "1", "2", "3"):
            np.testing.assert_allclose(together[f"{family}-{stage}"], expected, rtol=2e-6)
        weights = [
            AutoModelForCausalLM.from_pretrained(tmp_path / f"{family}-{run}").state_dict()
            for run in ("0-1", "2-2", "3-2")
        ]
        for name, weight in weights[0].items():
            for other in weights[1:]:
                if name.endswith("c_attn.bias"):
                    # Attention does not change with a common shift of all its keys: their bias has
                    # no gradient but rounding, which Adam makes steps of. Queries and values then.
                    query, _, value = other[name].chunk(3)
                    torch.testing.assert_close(query, weight.chunk(3)[0], rtol=1e-4, atol=2e-5)
                    torch.testing.assert_close(value, weight.chunk(3)[2], rtol=1e-4, atol=2e-5)
                    continue
                torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=2e-5)
    rest = train_in_processes(1, ["0", "1", "2", "3"], tmp_path, start=2)
    for name, losses in rest.items():  # two workers have started, one has resumed
        np.testing.assert_allclose(losses, together[name][2:], rtol=2e-6)
