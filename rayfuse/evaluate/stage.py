"""The evaluate stage: Ray tasks score the held-out rows with every model of the run."""

import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from rayfuse.evaluate.scores import (
    DocumentScore,
    Evaluation,
    find_role,
    parse_evaluation,
    sum_documents,
)
from rayfuse.layout import Layout, describe_model
from rayfuse.model_files import load_recipe_tokenizer, read_model_files
from rayfuse.progress import Progress
from rayfuse.recipe import ModelSettings, Recipe, SourceSettings
from rayfuse.storage.dataset import Commit, DataSet
from rayfuse.storage.store import Store


@dataclass(frozen=True)
class ScoreTask:
    """All that a worker needs to score shards with one model."""

    name: str
    model: ModelSettings
    held_out: DataSet
    batch_tokens: int
    trained_folder: str | None
    """Below the storage root; nothing where the model is not of this run's making."""


@dataclass(frozen=True)
class ScoredShards:
    """What one task found."""

    documents: list[DocumentScore]
    seconds: float
    """Loading the model included."""


def evaluate_models(recipe: Recipe, layout: Layout, progress: Progress) -> dict[str, Evaluation]:
    """Score every model that is not scored yet, all at once, and return all results by name.

    Raises:
        ValueError: The held-out rows are not whole or there are none, a model is not trained yet,
            or a model cannot score a row.
    """
    names = [name for name in layout.evaluations if not _is_evaluated(layout, name)]
    if names:
        _score_models(recipe, layout, names, progress)
    return {
        name: parse_evaluation(layout.store.read(file)) for name, file in layout.evaluations.items()
    }


def group_shards(commits: Iterable[Commit], task_tokens: int) -> list[list[int]]:
    """Return shards in runs of about `task_tokens`, one run a task; empty shards are left out.

    A corpus of many small files has many small held-out shards, and loading the model would cost
    more than scoring one of them.
    """
    groups: list[list[int]] = []
    room = 0
    for commit in sorted(commits, key=lambda commit: commit.shard):
        if not commit.rows:
            continue
        if commit.tokens > room:
            groups.append([])
            room = task_tokens
        groups[-1].append(commit.shard)
        room -= commit.tokens
    return groups


def _score_models(recipe: Recipe, layout: Layout, names: list[str], progress: Progress) -> None:
    groups = _plan_groups(recipe, layout)
    num_shards = sum(len(group) for group in groups)
    pending: dict[Any, tuple[str, int]] = {}
    for name in names:
        task = _plan_task(recipe, layout, name)
        remote: Any = ray.remote(**_resource_options(task.model))(score_shards)
        pending |= {remote.remote(task, group): (name, i) for i, group in enumerate(groups)}
    found: dict[str, dict[int, ScoredShards]] = {name: {} for name in names}
    try:
        while pending:
            (ready,), _ = ray.wait(list(pending), num_returns=1)
            name, index = pending[ready]
            found[name][index] = _fetch(ready)
            del pending[ready]
            done = sum(len(groups[i]) for i in found[name])
            progress(f"evaluate {name}", done, num_shards, "shards")
            if done == num_shards:
                parts = [found[name][i] for i in range(len(groups))]
                evaluation = _join_parts(name, describe_model(recipe, name, layout), parts)
                layout.store.write(layout.evaluations[name], evaluation.to_json())
    finally:
        for reference in pending:  # after an error: what is still running would be lost anyhow
            ray.cancel(reference)


def _plan_groups(recipe: Recipe, layout: Layout) -> list[list[int]]:
    if not layout.held_out.is_whole():
        raise ValueError("the held-out rows are not whole; run `rayfuse corpus` first")
    groups = group_shards(layout.held_out.commits().values(), recipe.corpus.shard_tokens)
    if not groups:
        raise ValueError("there are no held-out rows; raise evaluate.held_out_share")
    return groups


def _plan_task(recipe: Recipe, layout: Layout, name: str) -> ScoreTask:
    run = next((run for run in layout.runs if run.name == name), None)
    if run is not None and "done.json" not in layout.store.sizes(run.folder):
        raise ValueError(f"the model {name} is not trained; run `rayfuse train` first")
    return ScoreTask(
        name=name,
        model=describe_model(recipe, name, layout),
        held_out=layout.held_out,
        batch_tokens=recipe.evaluate.batch_tokens,
        trained_folder=None if run is None else f"{run.folder}/model",
    )


def _is_evaluated(layout: Layout, name: str) -> bool:
    folder, _, file = layout.evaluations[name].rpartition("/")
    return file in layout.store.sizes(folder)


def _join_parts(name: str, model: ModelSettings, parts: list[ScoredShards]) -> Evaluation:
    documents = sum_documents(document for part in parts for document in part.documents)
    seconds = sum(part.seconds for part in parts)
    return Evaluation(name, find_role(name), model.model, documents, seconds)


def _fetch(reference: Any) -> ScoredShards:
    """Return a task's result; its ValueError comes back as itself, without Ray's frame."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise error.cause from error
        raise


def _resource_options(model: ModelSettings) -> dict[str, Any]:
    """Return what a task asks of Ray; by default one CPU, and a whole GPU where there is any."""
    gpus = 1.0 if ray.cluster_resources().get("GPU", 0) > 0 else 0.0
    options: dict[str, Any] = {"num_cpus": 1.0, "num_gpus": gpus}
    if isinstance(model, SourceSettings):
        options["num_cpus"] = model.cpus
        options["num_gpus"] = gpus if model.gpus is None else model.gpus
        if model.accelerator_type is not None:
            options["accelerator_type"] = model.accelerator_type
    return options


def score_shards(task: ScoreTask, shards: list[int]) -> ScoredShards:
    """Score held-out shards with one model; run by Ray, which finds the function by this name."""
    import torch

    from rayfuse.evaluate.scoring import load_scored_model, score_documents, score_rows

    began = time.monotonic()
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    torch.set_num_threads(max(1, int(cpus)))
    documents: list[DocumentScore] = []
    with hold_model(task) as model:
        lm, tokenizer = load_scored_model(model), load_recipe_tokenizer(model)
        for shard in shards:
            rows = task.held_out.read_shard(task.held_out.read_commit(shard))
            nats = score_rows(
                lm,
                tokenizer,
                rows,
                name=task.name,
                batch_tokens=task.batch_tokens,
                context_tokens=read_model_files(model.model, model.revision).context_tokens,
            )
            documents += score_documents(rows, nats)
    return ScoredShards(sum_documents(documents), time.monotonic() - began)


@contextmanager
def hold_model(task: ScoreTask) -> Iterator[ModelSettings]:
    """Give a model that can be loaded; one trained into object storage is copied here meanwhile."""
    store = task.held_out.store
    if task.trained_folder is None or "://" not in store.root:
        yield task.model
        return
    with tempfile.TemporaryDirectory(prefix="rayfuse-model-") as folder:
        copy_folder(store, task.trained_folder, Path(folder))
        yield task.model.model_copy(update={"model": folder})


def copy_folder(store: Store, folder: str, path: Path) -> None:
    """Copy the files right below a folder of a store to a local folder that exists."""
    for name in store.sizes(folder):
        (path / name).write_bytes(store.read(f"{folder}/{name}"))
