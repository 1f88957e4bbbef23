"""A training that lost its end goes on from its last checkpoint and ends with the same weights."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rayfuse.pipeline import prepare_run, run_stages
from rayfuse.progress import report_nothing
from rayfuse.recipe import read_recipe
from tests.test_job import write_recipe


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_run_that_lost_its_end_goes_on_from_its_checkpoint_to_the_same_weights(
    ray_cluster, tmp_path
):
    overrides = ["train.checkpoint_every_steps=3", "train.baseline=false", "train.epochs=2"]
    recipe = read_recipe(write_recipe(tmp_path), overrides)
    layout = prepare_run(recipe)
    stages = ("corpus", "capture", "train")
    run_stages(recipe, layout, stages, report_nothing, lambda result: None)
    (run,) = layout.runs
    folder = Path(layout.store.root, run.folder)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(folder / "model/model.safetensors")
    assert len(metrics) > 3
    assert list(folder.glob("checkpoints/records/step_*"))
    for name in ("done.json", "metrics.jsonl", "model/model.safetensors"):
        os.remove(folder / name)
    run_stages(recipe, layout, stages, report_nothing, lambda result: None)
    again = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = max(int(path.name[5:13]) for path in folder.glob("checkpoints/step_*"))
    assert 0 < last < len(metrics)
    assert again[:last] == metrics[:last]  # read from the checkpoint, seconds and all
    assert [without_times(each) for each in again] == [without_times(each) for each in metrics]
    resumed = load_file(folder / "model/model.safetensors")
    for name, weight in weights.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0)


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    times = {"seconds", "wait_seconds", "tokens_per_second", "flops_per_second", "memory_gib"}
    return {name: value for name, value in record.items() if name not in times}
