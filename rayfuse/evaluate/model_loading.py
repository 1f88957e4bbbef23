"""A model to be evaluated, where a worker can load it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rayfuse.config.models import ModelSettings
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.store import Store


@dataclass(frozen=True)
class ScoringJob:
    """All that a worker needs to score held-out rows with one model."""

    name: str
    model: ModelSettings
    held_out: DataSet
    batch_tokens: int
    own_folder: str | None
    """Below the storage root; nothing where the model is not of this run's making."""
    costs: DataSet | None = None
    """Where a source of the ensemble leaves what it pays token by token."""


@contextmanager
def local_model(task: ScoringJob) -> Iterator[ModelSettings]:
    """Give a model that can be loaded; one trained into object storage is copied here meanwhile."""
    store = task.held_out.store
    if task.own_folder is None or "://" not in store.root:
        yield task.model
        return
    with tempfile.TemporaryDirectory(prefix="rayfuse-model-") as folder:
        copy_folder(store, task.own_folder, Path(folder))
        yield task.model.model_copy(update={"model": folder})


def copy_folder(store: Store, folder: str, path: Path) -> None:
    """Copy the files right below a folder of a store to a local folder that exists."""
    for name in store.sizes(folder):
        (path / name).write_bytes(store.read(f"{folder}/{name}"))
