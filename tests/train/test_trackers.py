"""Metrics reach the trackers that a recipe asks for, under distinct names."""

from pathlib import Path
from typing import Any

import pytest

from rayfuse.config.load import parse_recipe
from rayfuse.config.recipe import Recipe
from rayfuse.run.layout import TrainRun
from rayfuse.storage.store import LocalStore
from rayfuse.train import trackers as trackers_module
from rayfuse.train.trackers import Trackers, check_trackers

RUN = TrainRun("fused", "train/fused-x", "x", True)
RECORD: dict[str, Any] = {
    "step": 3,
    "loss": 1.5,
    "is_skipped": False,
    "fusion_loss": None,
    "source_losses": {"mpt": 0.25},
    "batch_id": "abc",
}
NUMBERS = {"loss": 1.5, "source/mpt": 0.25}


def make_recipe(*names: str) -> Recipe:
    return parse_recipe(
        {
            "storage": "/nowhere",
            "corpus": {"documents": "x.jsonl"},
            "target": {"model": "t"},
            "sources": [{"name": "mpt", "model": "m"}],
            "train": {"trackers": list(names)},
        }
    )


def test_a_tracker_that_is_not_installed_is_named_before_anything_starts(monkeypatch):
    check_trackers(make_recipe("tensorboard"))
    monkeypatch.setattr(trackers_module.importlib.util, "find_spec", lambda _: None)
    check_trackers(make_recipe())
    with pytest.raises(ValueError, match=r"train\.trackers names wandb, .* pip install wandb"):
        check_trackers(make_recipe("wandb"))


def test_tensorboards_files_lie_in_the_store_and_hold_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    store = LocalStore(str(tmp_path))
    trackers = Trackers(make_recipe("tensorboard"), RUN, is_on=True)
    trackers.open()
    for step in (3, 4):
        trackers.log(RECORD | {"step": step})
    trackers.log({"step": 4, "bits_per_byte": 2.5})
    trackers.upload(store)
    trackers.close()
    found = EventAccumulator(str(tmp_path / "train/fused-x/tensorboard"))
    found.Reload()
    for name, value in NUMBERS.items():
        scalars = found.Scalars(f"train/{name}")
        assert [(scalar.step, scalar.value) for scalar in scalars] == [(3, value), (4, value)]
    (bits,) = found.Scalars("train/bits_per_byte")
    assert (bits.step, bits.value) == (4, 2.5)


def test_other_workers_write_nothing(tmp_path):
    trackers = Trackers(make_recipe("tensorboard"), RUN, is_on=False)
    trackers.open()
    trackers.log(RECORD)
    trackers.upload(LocalStore(str(tmp_path)))
    trackers.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")  # of its own libraries
def test_mlflow_resumes_the_same_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for step in (3, 4):  # the second one as after a restart
        trackers = Trackers(make_recipe("mlflow"), RUN, is_on=True)
        trackers.open()
        trackers.log(RECORD | {"step": step})
        trackers.close()
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("rayfuse")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "fused-x"
    for name, value in NUMBERS.items():
        history = client.get_metric_history(run.info.run_id, name)
        assert [(scalar.step, scalar.value) for scalar in history] == [(3, value), (4, value)]


def test_weights_and_biases_resumes_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for step in (3, 4):
        trackers = Trackers(make_recipe("wandb"), RUN, is_on=True)
        trackers.open()
        trackers.log(RECORD | {"step": step})
        trackers.close()
    files = [path.name for path in Path(tmp_path).rglob("run-*.wandb")]
    assert files and set(files) == {"run-fused-x.wandb"}
