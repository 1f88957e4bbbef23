"""What a stored item has cost to make: worker time from its records, dollars from its prices."""

import json
from dataclasses import dataclass
from typing import Any

from rayfuse.config.models import SourceSettings
from rayfuse.config.plan import PlanSettings
from rayfuse.config.prices import price_actor, price_worker
from rayfuse.config.train import TrainSettings
from rayfuse.run.made_models import read_done
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.items import FINGERPRINTED, StoredItem
from rayfuse.storage.store import Store


@dataclass(frozen=True)
class ItemCost:
    """The cost of making an item again; None where no record or no price gives it."""

    worker_seconds: float | None = None
    """Of actors of a source, of training workers, or of evaluation tasks."""
    dollars: float | None = None


def read_cost(store: Store, item: StoredItem, plan: PlanSettings) -> ItemCost:
    """Read what an item has cost.

    A capture counts the time of its actors, busy and idle, a training that of its steps, a score
    that of its tasks. Other items have no record of it.

    Args:
        store: The store.
        item: The item.
        plan: The prices of GPUs and CPUs.
    """
    try:
        if item.stage == "captured":
            return _cost_capture(store, item, plan)
        if item.is_training:
            return _cost_training(store, item, plan)
        if item.stage == "evaluate" and not item.is_folder:
            return ItemCost(float(json.loads(store.read(f"{item.name}.json"))["seconds"]))
    # Corrupt or missing records, of any earlier version: nothing depends on a cost.
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        pass
    return ItemCost()


def _cost_capture(store: Store, item: StoredItem, plan: PlanSettings) -> ItemCost:
    found = FINGERPRINTED.fullmatch(item.name.rpartition("/")[2])
    assert found is not None, "items are found by this pattern"
    data = DataSet(store, item.stage, found["name"] or "", found["fingerprint"])
    stats = [commit.stats for commit in data.commits().values()]
    if not all("busy_seconds" in one for one in stats):
        return ItemCost()
    seconds = sum(one["busy_seconds"] + one["idle_seconds"] for one in stats)
    return ItemCost(seconds, _price_capture(data, seconds, plan))


def _price_capture(data: DataSet, seconds: float, plan: PlanSettings) -> float | None:
    try:
        sources: list[dict[str, Any]] = data.read_run()["recipe"]["sources"]
        found = next(source for source in sources if source["name"] == data.name)
        return seconds / 3600 * price_actor(SourceSettings.model_validate(found), plan)
    except (ValueError, KeyError, StopIteration):  # no price, or settings of another version
        return None


def _cost_training(store: Store, item: StoredItem, plan: PlanSettings) -> ItemCost:
    lines = store.read(f"{item.name}/metrics.jsonl").splitlines()
    steps = [json.loads(line) for line in lines]
    seconds = sum(step["seconds"] * step["num_workers"] for step in steps)
    record = read_done(store, item.name)
    if record is None:
        return ItemCost(seconds)
    try:
        train = TrainSettings.model_validate(record["recipe"]["train"])
        return ItemCost(seconds, seconds / 3600 * price_worker(train, plan))
    except (ValueError, KeyError):
        return ItemCost(seconds)
