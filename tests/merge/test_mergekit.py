"""The merges that mergekit has are equal to those of its own command."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rayfuse.config.merge import MergeSettings
from rayfuse.merge.streamed import merge_folders
from tests.merge.folders import make_model, make_pivot

pytest.importorskip("mergekit")

SETTINGS = MergeSettings(weights={"a": 1.0, "b": 3.0}, t=0.3, scale=0.4, density=0.5, tau=0.3)

PARAMETERS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "linear": ({}, [{"weight": 1.0}, {"weight": 3.0}]),
    "slerp": ({"t": 0.3}, [{}, {}]),
    "task_arithmetic": ({"normalize": False, "lambda": 0.4}, [{"weight": 1.0}, {"weight": 3.0}]),
    "ties": ({}, [{"weight": 1.0, "density": 0.5}, {"weight": 3.0, "density": 0.5}]),
    "sce": ({"select_topk": 0.3}, [{}, {}]),
}
"""Of mergekit, for these settings: those of the merge, and those of each model.

DARE differs: mergekit rescales the kept changes to their L1 norm before, not by the density.
"""


@pytest.mark.parametrize("method", [*PARAMETERS])
def test_a_merge_equals_mergekits_own_command(tmp_path: Path, method: str):
    pivot = make_pivot(tmp_path / "pivot")
    models = {name: make_model(pivot, tmp_path / name, ord(name)) for name in "ab"}
    common, own = PARAMETERS[method]
    config = {
        "merge_method": method,
        "dtype": "float32",
        "parameters": common,
        "models": [
            {"model": str(folder), "parameters": parameters}
            for folder, parameters in zip(models.values(), own, strict=True)
        ],
    }
    if method != "linear":
        config["base_model"] = str(models["a"] if method == "slerp" else pivot)
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml"]
    arguments = [str(tmp_path / "merge.yaml"), str(tmp_path / "theirs"), "--quiet"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (tmp_path / "ours").mkdir()
    merge_folders(models, pivot, tmp_path / "ours", method=method, settings=SETTINGS)
    theirs = {
        name: tensor
        for file in (tmp_path / "theirs").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6, msg=name)
