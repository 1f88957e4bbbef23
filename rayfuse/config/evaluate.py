"""The held-out text and the tasks that models are scored on."""

import re
from typing import Annotated

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    field_validator,
)

from rayfuse.config.base import Settings, result_neutral
from rayfuse.config.corpus import Documents
from rayfuse.config.overrides import shorten

TASK_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


class TasksSettings(Settings):
    """Benchmark tasks that models are scored on by lm-eval (`pip install rayfuse[tasks]`)."""

    names: Annotated[tuple[str, ...], Field(min_length=1)]
    """Tasks, groups of tasks or tags: those of `folder`, or lm-eval's own, which come from the hub.
    A group has one score, the mean over its tasks."""
    folder: str | None = None
    """A folder of task definitions, lm-eval's YAML and the Python beside it, which is run."""
    data: str | None = None
    """The folder of the data sets, passed to the definitions of `folder` as `data`."""
    num_fewshot: NonNegativeInt | None = None
    """Few-shot examples before each question; by default the number in each definition."""
    limit: PositiveInt | None = None
    """Maximum questions of each task, the first ones; by default all."""

    @field_validator("names")
    @classmethod
    def _check_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not TASK_PATTERN.fullmatch(name):
                raise ValueError(
                    f"{shorten(name)} is not a task name; give a folder as tasks.folder"
                )
            if names.count(name) > 1:
                raise ValueError(f"the task {name!r} is listed twice")
        return names


class EvaluateSettings(Settings):
    """The held-out text and how models are scored on it."""

    documents: Documents | None = None
    """Text that no model was trained on; by default a share of the corpus is held out."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Share of the corpus's documents that is held out if `documents` is not set."""
    batch_tokens: PositiveInt = result_neutral(16_384)
    """Tokens in one forward pass."""
    bootstrap_samples: PositiveInt = 2000
    """Resamples of the documents for the confidence intervals."""
    tasks: TasksSettings | None = None
    """Tasks for lm-eval; by default none."""
    run_generated_code: bool = result_neutral(False)
    """Let tasks run the code that models write (HumanEval, MultiPL-E), in a sandbox."""
