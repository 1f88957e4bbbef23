"""Training stops at a checkpoint when it is to, and its curve is that of an undisturbed run."""

import json
from pathlib import Path
from typing import Any

import pytest

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.config.load import parse_recipe
from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.remaining import list_remaining
from rayfuse.run.layout import Layout, plan_layout
from rayfuse.runtime.progress import ProgressEvent, StoppedEarly, report_nothing
from rayfuse.train.checkpoint import Checkpoints
from rayfuse.train.stage import train_runs
from tests.stored_run import write_run

pytestmark = pytest.mark.ray

NUM_STEPS = 40
TIMES = ("seconds", "tokens_per_second", "flops_per_second", "memory_gib", "mfu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    train: dict[str, Any] = {
        **{"num_workers": 1, "gpus_per_worker": 0, "baseline": False, "rows_per_step": 100},
        **{"epochs": NUM_STEPS, "checkpoint_every_steps": 1000, "validation_rows": 0},
    }
    return write_run(tmp_path_factory.mktemp("run"), train=train)


def read_curve(layout: Layout) -> list[dict[str, Any]]:
    lines = layout.store.read(f"{layout.runs[0].folder}/metrics.jsonl").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.endswith(TIMES)}
        for line in lines
    ]


def test_training_stops_at_a_checkpoint_and_resumes_with_the_same_curve(recipe, ray_cluster):
    layout = plan_layout(recipe, ALIGN_FACTS)
    events: list[ProgressEvent] = []

    def is_third_step_done() -> bool:
        return max((event.done for event in events), default=0) >= 3

    with pytest.raises(StoppedEarly):
        train_runs(recipe, layout, events.append, is_third_step_done)
    (records,) = Checkpoints(layout.store, layout.runs[0].folder).list_complete().values()
    stopped_at = records[0].step
    assert 3 <= stopped_at < NUM_STEPS
    (left,) = list_remaining(recipe, layout)
    assert left.describe() == f"train fused {NUM_STEPS - stopped_at} of {NUM_STEPS} steps"
    assert events[-1].worker_seconds > 0
    train_runs(recipe, layout, events.append)
    assert any(f"resuming from the checkpoint of step {stopped_at}" in e.note for e in events)
    assert list_remaining(recipe, layout) == []

    calm = plan_layout(copy_run(recipe, layout), ALIGN_FACTS)
    train_runs(recipe, calm, report_nothing)
    assert len(read_curve(calm)) == NUM_STEPS
    assert read_curve(layout) == read_curve(calm)
    model = f"{layout.runs[0].folder}/model"
    weights = [name for name in layout.store.sizes(model) if name.endswith(".safetensors")]
    assert weights
    for name in weights:
        assert layout.store.read(f"{model}/{name}") == calm.store.read(f"{model}/{name}")


def copy_run(recipe: Recipe, layout: Layout) -> Recipe:
    """Copy the rows of a run to another storage, without its training."""
    root = Path(layout.store.root).with_name("calm")
    copied = parse_recipe(dump_recipe(recipe) | {"storage": str(root)})
    store = plan_layout(copied, ALIGN_FACTS).store
    for folder in ("corpus", "captured", "aligned"):
        for name in layout.store.walk(folder).sizes:
            store.write(f"{folder}/{name}", layout.store.read(f"{folder}/{name}"))
    return copied
