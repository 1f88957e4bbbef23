"""What a run has still to do: shards of its data sets, steps of its trainings."""

from dataclasses import dataclass

from rayfuse.config.recipe import Recipe
from rayfuse.run.layout import Layout, TrainRun
from rayfuse.run.made_models import is_made, read_inputs
from rayfuse.train.checkpoint import Checkpoints
from rayfuse.train.order import count_steps


@dataclass(frozen=True)
class Remaining:
    """What is left of one part of a run."""

    part: str
    """Such as `capture mpt`."""
    left: int
    total: int
    unit: str
    """Shards or steps."""

    def describe(self) -> str:
        """Describe it for a message."""
        return f"{self.part} {self.left:,} of {self.total:,} {self.unit}"


def list_remaining(recipe: Recipe, layout: Layout) -> list[Remaining]:
    """List the parts of a run that are incomplete; without a corpus nothing is known.

    Steps count from the newest complete checkpoint.

    Raises:
        ShardError: A record is corrupt.
    """
    manifest = layout.corpus.read_manifest()
    if manifest is None:
        return []
    parts = [("capture", data) for data in layout.captured.values()]
    parts += [("align", data) for data in layout.aligned.values()]
    found: list[Remaining] = []
    for stage, data in parts:
        left = manifest.num_shards - len(data.list_committed(manifest.num_shards))
        found.append(Remaining(f"{stage} {data.name}", left, manifest.num_shards, "shards"))
    for run in layout.runs:
        settings = recipe.train.for_run(is_fused=run.is_fused)
        total = count_steps(manifest.rows, settings.rows_per_step, settings.epochs)
        left = total - _count_done(layout, run, total)
        found.append(Remaining(f"train {run.name}", left, total, "steps"))
    return [part for part in found if part.left]


def _count_done(layout: Layout, run: TrainRun, total: int) -> int:
    """Count the steps that are not repeated when a training resumes."""
    if is_made(layout.store, run.folder, read_inputs(layout, run)):
        return total
    complete = Checkpoints(layout.store, run.folder).list_complete()
    return max((records[0].step for records in complete.values()), default=0)
