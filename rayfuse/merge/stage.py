"""Merge trained targets: one Ray task for each merge."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from rayfuse.config.merge import MergeSettings
from rayfuse.config.models import ModelSettings
from rayfuse.evaluate.model_loading import local_model
from rayfuse.merge.plan import MergePlan
from rayfuse.merge.streamed import merge_folders
from rayfuse.models.folder import PLAIN_FILES, find_folder
from rayfuse.models.host_memory import estimate_merge_memory
from rayfuse.run.layout import describe_model
from rayfuse.run.made_models import is_made, store_model
from rayfuse.runtime.progress import Progress, ProgressEvent
from rayfuse.runtime.resources import TASK_RETRIES, memory_options, reserve_memory
from rayfuse.runtime.scratch import scratch_folder
from rayfuse.runtime.wait import fetch_result
from rayfuse.storage.seal import ShardError
from rayfuse.storage.store import Store


@dataclass(frozen=True)
class MergeJob:
    """Everything that a worker needs to make one merge."""

    method: str
    settings: MergeSettings
    store: Store
    target: ModelSettings
    models: dict[str, tuple[ModelSettings, str]]
    """By source: the trained target, and its model's folder below the storage root."""
    folder: str
    """Of the merge, below the storage root."""
    inputs: dict[str, str]
    """Of its record."""


def merge_models(plan: MergePlan, progress: Progress) -> None:
    """Make every merge that is missing, all in parallel.

    Args:
        plan: The plan; all of its targets are trained.
        progress: Receives an event after each merge.

    Raises:
        UserError: The models cannot be merged.
        ShardError: A file of a model is missing or corrupt.
    """
    names = plan.list_unmerged()
    if not names:
        return
    needed = float(estimate_merge_memory(plan.recipe.target, len(plan.pairs)))
    memory = memory_options(reserve_memory({"CPU": 1.0}, None, needed))
    merge: Any = ray.remote(num_cpus=1, max_retries=TASK_RETRIES, **memory)(write_merge)
    pending = {merge.remote(_plan_job(plan, name)): name for name in names}
    try:
        while pending:
            (ready,), _ = ray.wait([*pending], num_returns=1)
            fetch_result(ready, ValueError, ShardError)
            progress(ProgressEvent("merge", pending.pop(ready), 1, 1, "models"))
    finally:
        for reference in pending:
            ray.cancel(reference)


def _plan_job(plan: MergePlan, name: str) -> MergeJob:
    models = {
        pair.source: (
            describe_model(plan.recipe, pair.run.name, plan.layout),
            f"{pair.run.folder}/model",
        )
        for pair in plan.pairs
    }
    return MergeJob(
        method=plan.merges[name],
        settings=plan.recipe.merge,
        store=plan.layout.store,
        target=plan.recipe.target,
        models=models,
        folder=plan.folder_of(name),
        inputs=plan.read_inputs(),
    )


def write_merge(job: MergeJob) -> None:
    """Merge models, and store the result with its record last; a Ray task.

    Where another job has stored the same merge meanwhile, nothing is written.
    """
    if is_made(job.store, job.folder, job.inputs):
        return
    pivot = find_folder(job.target.model, job.target.revision, ("*.safetensors", *PLAIN_FILES))
    with ExitStack() as stack:
        folders = {
            source: Path(stack.enter_context(local_model(model, job.store, folder)).model)
            for source, (model, folder) in job.models.items()
        }
        merged = stack.enter_context(scratch_folder("merge"))
        merge_folders(folders, pivot, merged, method=job.method, settings=job.settings)
        store_model(job.store, job.folder, merged, job.inputs)
