"""Metrics to TensorBoard, Weights & Biases and MLflow, where they are asked for and installed."""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from rayfuse.config.recipe import Recipe
from rayfuse.run.layout import TrainRun


def check_trackers(recipe: Recipe) -> None:
    """Raise unless all trackers that a recipe asks for are installed.

    Raises:
        ValueError: One is not.
    """
    for name in recipe.train.trackers:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"train.trackers names {name}, which is not installed; pip install {name}, or "
                "remove it from the recipe"
            )


class Trackers:
    """All that a recipe asks for, of one training."""

    def __init__(self, recipe: Recipe, run: TrainRun, *, is_on: bool) -> None:
        """Begin, in the project `rayfuse` and under the run's name and fingerprint.

        Args:
            recipe: Says which.
            run: The training.
            is_on: False on all workers but one.
        """
        self.names = recipe.train.trackers if is_on else ()
        self.store_folder = f"{run.folder}/tensorboard"
        title, config = f"{run.name}-{run.fingerprint}", recipe.model_dump(mode="json")
        if "tensorboard" in self.names:
            from torch.utils.tensorboard import SummaryWriter

            self.board_folder = tempfile.TemporaryDirectory()
            self.board = SummaryWriter(self.board_folder.name)
        if "wandb" in self.names:
            import wandb  # pyright: ignore[reportMissingImports]

            self.wandb = wandb.init(
                project="rayfuse", name=title, id=title, resume="allow", config=config
            )
        if "mlflow" in self.names:
            import mlflow  # pyright: ignore[reportMissingImports]

            mlflow.set_experiment("rayfuse")
            of_title = f"attributes.run_name = '{title}'"
            begun = mlflow.search_runs(filter_string=of_title, output_format="list")
            if begun:  # before this training was interrupted
                mlflow.start_run(run_id=begun[0].info.run_id)
            else:
                mlflow.start_run(run_name=title)
            self.mlflow = mlflow

    def log(self, record: dict[str, Any]) -> None:
        """Write the numbers of a step."""
        if not self.names:
            return
        step = record["step"]
        numbers = {
            name: value for name, value in record.items() if isinstance(value, int | float)
        } | {f"source/{name}": value for name, value in record.get("source_losses", {}).items()}
        if "tensorboard" in self.names:
            for name, value in numbers.items():
                self.board.add_scalar(f"train/{name}", value, step)
        if "wandb" in self.names:
            self.wandb.log(numbers, step=step)
        if "mlflow" in self.names:
            self.mlflow.log_metrics(numbers, step=step)

    def upload(self, store: Any) -> None:
        """Put TensorBoard's files into the store, beside metrics.jsonl."""
        if "tensorboard" in self.names:
            self.board.flush()
            for path in Path(self.board_folder.name).iterdir():
                store.upload(str(path), f"{self.store_folder}/{path.name}")

    def close(self) -> None:
        """End."""
        if "tensorboard" in self.names:
            self.board.close()
            self.board_folder.cleanup()
        if "wandb" in self.names:
            self.wandb.finish()
        if "mlflow" in self.names:
            self.mlflow.end_run()
