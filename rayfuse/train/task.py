"""Everything that the driver hands to the workers of a training."""

from dataclasses import dataclass
from typing import Any

from rayfuse.config.recipe import Recipe
from rayfuse.run.layout import TrainRun
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.store import Store


@dataclass(frozen=True)
class WorkerTask:
    """Everything that a worker needs to train its share of a run."""

    recipe: Recipe
    run: TrainRun
    store: Store
    corpus: DataSet
    aligned: dict[str, DataSet]
    """By source; empty for the run without fusion."""
    held_out: DataSet
    use_gpu: bool
    status: Any
    """The `RunStatus` actor."""
    control: Any
    """The `RunControl` actor."""
    inputs: dict[str, str]
    """What the run is trained on: see `made_models.read_inputs`."""
    job: str
    """An id of this call of `train_runs`; it keeps the local folders of two jobs apart."""
    can_stop: bool = False
    """Whether `control` may request a stop; each step then asks for it."""
