"""Limits in hours and dollars: what counts, when a command stops, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rayfuse.config.base import UserError
from rayfuse.config.models import SourceSettings
from rayfuse.config.plan import PlanSettings
from rayfuse.config.prices import price_actor, price_worker
from rayfuse.config.train import TrainSettings
from rayfuse.run import budget as budget_module
from rayfuse.run.budget import NO_LIMITS, Budget, Limits
from rayfuse.runtime.progress import ProgressEvent, StoppedEarly
from tests.small_run import write_recipe
from tests.test_cli import rayfuse

PRICES = {"capture a": 2.0, "capture b": 4.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(budget_module.time, "monotonic", lambda: now[0])
    return now


def make_source(**settings: Any) -> SourceSettings:
    return SourceSettings.model_validate({"name": "a", "model": "m"} | settings)


def test_a_command_without_limits_never_stops(clock):
    budget = Budget(NO_LIMITS, began=0.0)
    clock[0] = 1e9
    assert not budget.is_limited
    assert not budget.is_reached()


def test_hours_are_those_since_the_command_began(clock):
    budget = Budget(Limits(max_hours=2.0), began=500.0)
    clock[0] = 500.0 + 7199
    assert not budget.is_reached()
    clock[0] += 1
    assert budget.describe_reached() == "--max-hours 2"


def test_dollars_are_the_last_worker_time_of_each_part_times_its_price():
    seen: list[ProgressEvent] = []
    budget = Budget(Limits(max_dollars=5.0), PRICES)
    report = budget.watch(seen.append)
    for part, seconds in (("a", 900.0), ("a", 1800.0), ("b", 3600.0), ("free", 1e9), ("a", 0.0)):
        report(ProgressEvent("capture", part, worker_seconds=seconds))
    assert budget.dollars == pytest.approx(0.5 * 2 + 4)
    assert budget.describe_reached() == "--max-dollars 5"
    assert len(seen) == 5


def test_a_stage_without_a_place_of_its_own_to_stop_stops_at_an_event():
    seen: list[ProgressEvent] = []
    budget = Budget(Limits(max_dollars=1.0), PRICES, worker_seconds={"capture b": 3600.0})
    report = budget.watch(seen.append)
    report(ProgressEvent("capture", "b", 1, 2))
    report(ProgressEvent("train", "fused", 1, 2))
    report(ProgressEvent("evaluate", "fused", 1, 2))  # before its score is stored
    with pytest.raises(StoppedEarly):
        report(ProgressEvent("corpus", "rows", 1, 2))
    assert [event.stage for event in seen] == ["capture", "train", "evaluate", "corpus"]


@pytest.mark.parametrize(
    ("settings", "price"),
    [
        ({"dollars_per_hour": 0.3, "accelerator_type": "H100", "gpus": 8}, 0.3),
        ({"accelerator_type": "L4"}, 0.8),
        ({"accelerator_type": "L4", "gpus": 4}, 3.2),
        ({"accelerator_type": "L4", "gpus": 0.5}, 0.4),
        ({"gpus": 0, "cpus": 2}, 0.09),
    ],
)
def test_an_actor_costs_its_own_price_or_that_of_its_gpus_or_cpus(settings, price):
    assert price_actor(make_source(**settings), PlanSettings()) == pytest.approx(price)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"sources.a.dollars_per_hour is not set, .*sources.a.accelerator_type"),
        ({"gpus": 1}, r"sources.a.dollars_per_hour is not set"),
        ({"accelerator_type": "X9"}, r"sources.a.accelerator_type is 'X9', .*add plan.gpus.X9"),
    ],
)
def test_an_actor_without_a_price_is_refused_with_the_setting(settings, message):
    with pytest.raises(UserError, match=message):
        price_actor(make_source(**settings), PlanSettings())


def test_a_training_worker_costs_its_gpus_or_cpus_and_an_unknown_type_is_refused():
    plan = PlanSettings()
    train = TrainSettings(accelerator_type="H100", gpus_per_worker=2)
    assert price_worker(train, plan) == pytest.approx(2 * 6.9)
    cpus = TrainSettings(gpus_per_worker=0, cpus_per_worker=4)
    assert price_worker(cpus, plan) == pytest.approx(0.18)
    with pytest.raises(UserError, match=r"train.accelerator_type is not set.*plan.gpus"):
        price_worker(TrainSettings(), plan)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("limits"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-hours", "0"], "--max-hours is 0; give a number above 0"),
        (["--max-dollars", "nan"], "--max-dollars is nan; give a number above 0"),
        (["--max-dollars", "9"], "price of every worker: sources.neox.dollars_per_hour is not set"),
        (
            ["sources.neox.gpus=0", "--max-dollars", "9"],
            "price of every worker: train.accelerator_type is not set",
        ),
    ],
)
def test_a_wrong_limit_is_refused_before_a_cluster_is_joined(arguments, message, recipe):
    done = rayfuse("run", str(recipe), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (recipe.parent / "storage/corpus").exists()


@pytest.mark.ray
def test_a_run_stops_at_its_limit_with_exit_code_3_and_resumes(recipe):
    values = yaml.safe_load(recipe.read_text())
    values["sources"][0] |= {"gpus": 0, "dollars_per_hour": 1e9}
    values["train"]["gpus_per_worker"] = 0
    recipe.write_text(yaml.safe_dump(values))
    done = rayfuse("run", str(recipe), "--max-dollars", "1", "--json")
    assert done.returncode == 3, done.stderr
    assert "stopped at --max-dollars 1: " in done.stderr
    assert "to resume, run the same command" in done.stderr
    stopped = yaml.safe_load(done.stdout)["stopped"]
    assert stopped["limit"] == "--max-dollars 1"
    assert stopped["dollars"] >= 1
    assert "train" in stopped["stages"]
    assert stopped["left"]["train fused"]["steps"] == stopped["left"]["train fused"]["of"] > 0
    captured = stopped["left"].get("capture neox", {"shards": 0})
    done = rayfuse("capture", str(recipe), "--json")
    assert done.returncode == 0, done.stderr
    assert captured["shards"] < yaml.safe_load(done.stdout)["neox"]["shards"]
