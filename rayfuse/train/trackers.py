"""Metrics to TensorBoard, Weights & Biases and MLflow, if the recipe names them."""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from rayfuse.config.base import UserError
from rayfuse.config.recipe import Recipe
from rayfuse.run.layout import TrainRun
from rayfuse.storage.store import Store


def check_trackers(recipe: Recipe) -> None:
    """Check that every tracker of a recipe is installed.

    Raises:
        UserError: One is not.
    """
    for name in recipe.train.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"train.trackers names {name}, which is not installed; pip install {name}, or "
                "remove it from the recipe"
            )


class Trackers:
    """The trackers of one run; without any, every method does nothing."""

    def __init__(self, recipe: Recipe, run: TrainRun, *, is_on: bool) -> None:
        """Name the run as the trackers will show it: by its name and fingerprint.

        Args:
            recipe: Names the trackers.
            run: The run.
            is_on: False on all workers but one.
        """
        self.names = recipe.train.trackers if is_on else ()
        self.title, self.config = f"{run.name}-{run.fingerprint}", recipe.model_dump(mode="json")
        self.store_folder = f"{run.folder}/tensorboard"
        self.local_folder: tempfile.TemporaryDirectory[str] | None = None
        self.tensorboard: Any = None
        self.wandb: Any = None
        self.mlflow: Any = None

    def open(self) -> None:
        """Start each tracker, in the project `rayfuse`; a run that is resumed continues its own."""
        # Imported late: each is optional, and check_trackers has named the one that is missing.
        if "tensorboard" in self.names:
            from torch.utils.tensorboard import SummaryWriter

            self.local_folder = tempfile.TemporaryDirectory()
            self.tensorboard = SummaryWriter(self.local_folder.name)
        if "wandb" in self.names:
            import wandb  # pyright: ignore[reportMissingImports]

            self.wandb = wandb.init(
                project="rayfuse",
                name=self.title,
                id=self.title,
                resume="allow",
                config=self.config,
            )
        if "mlflow" in self.names:
            import mlflow  # pyright: ignore[reportMissingImports]

            mlflow.set_experiment("rayfuse")
            has_title = f"attributes.run_name = '{self.title}'"
            earlier = mlflow.search_runs(filter_string=has_title, output_format="list")
            if earlier:
                mlflow.start_run(run_id=earlier[0].info.run_id)
            else:
                mlflow.start_run(run_name=self.title)
            self.mlflow = mlflow

    def log(self, record: dict[str, Any]) -> None:
        """Log the numbers of a step; `record["step"]` is its number."""
        step = record["step"]
        numbers = {
            name: value for name, value in record.items() if isinstance(value, int | float)
        } | {f"source/{name}": value for name, value in record.get("source_losses", {}).items()}
        if self.tensorboard is not None:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(f"train/{name}", value, step)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)
        if self.mlflow is not None:
            self.mlflow.log_metrics(numbers, step=step)

    def upload(self, store: Store) -> None:
        """Upload TensorBoard's files to the store, beside metrics.jsonl."""
        if self.local_folder is not None:
            self.tensorboard.flush()
            for path in Path(self.local_folder.name).iterdir():
                store.upload(str(path), f"{self.store_folder}/{path.name}")

    def close(self) -> None:
        """Finish each tracker's run."""
        if self.local_folder is not None:
            self.tensorboard.close()
            self.local_folder.cleanup()
        if self.wandb is not None:
            self.wandb.finish()
        if self.mlflow is not None:
            self.mlflow.end_run()
