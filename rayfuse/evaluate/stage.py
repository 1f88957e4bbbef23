"""The evaluate stage: Ray tasks score the held-out rows with every model of the run."""

import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayTaskError

from rayfuse.config.models import ModelSettings, SourceSettings
from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.evaluate.ask import LmEvalJob, ask_ensemble, ask_model
from rayfuse.evaluate.model_loading import ScoringJob, local_model
from rayfuse.evaluate.scores import (
    DocumentScore,
    Evaluation,
    find_role,
    parse_evaluation,
    sum_documents,
)
from rayfuse.models.files import find_folder, load_recipe_tokenizer, read_model_files
from rayfuse.run.layout import Layout, describe_model, find_own_folder
from rayfuse.runtime.logging import log_event
from rayfuse.runtime.metrics import count_work
from rayfuse.runtime.progress import Progress
from rayfuse.runtime.resources import (
    TASK_RETRIES,
    count_actor_gpus,
    count_default_gpus,
    gpu_options,
)
from rayfuse.storage.dataset import Commit, DataSet
from rayfuse.storage.store import Store

ENSEMBLE, MERGED = "ensemble", "merged"


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
        groups = _plan_groups(recipe, layout)
        shards = {shard for group in groups for shard in group}
        if ENSEMBLE in names:
            for name, costs in layout.token_nll.items():
                costs.claim({"recipe": dump_recipe(recipe), "source": name})
                if shards - costs.list_committed() and name not in names:
                    names.append(name)
        _score_models(
            recipe, layout, [name for name in names if name != ENSEMBLE], groups, progress
        )
        if ENSEMBLE in names:
            _score_ensemble(recipe, layout, groups, progress)
    if recipe.evaluate.tasks is not None:
        _ask_models(recipe, layout, progress)
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


def _score_models(
    recipe: Recipe, layout: Layout, names: list[str], groups: list[list[int]], progress: Progress
) -> None:
    tasks = {name: _plan_task(recipe, layout, name) for name in names}
    pending: dict[Any, tuple[str, int]] = {}
    for name, task in tasks.items():
        made = _merge_models(recipe, layout) if name == MERGED else None
        remote: Any = ray.remote(**_resource_options(task.model, recipe))(score_shards)
        pending |= {remote.remote(task, each, made): (name, i) for i, each in enumerate(groups)}
    for name, parts in _gather(pending, groups, progress):
        evaluation = _join_parts(name, tasks[name].model.model, parts)
        layout.store.write(layout.evaluations[name], evaluation.to_json())


def _score_ensemble(
    recipe: Recipe, layout: Layout, groups: list[list[int]], progress: Progress
) -> None:
    average: Any = ray.remote(max_retries=TASK_RETRIES)(average_shards)
    costs = list(layout.token_nll.values())
    pending = {
        average.remote(layout.held_out, costs, group): (ENSEMBLE, i)
        for i, group in enumerate(groups)
    }
    for name, parts in _gather(pending, groups, progress):
        evaluation = _join_parts(name, ", ".join(layout.token_nll), parts)
        layout.store.write(layout.evaluations[name], evaluation.to_json())


def _gather(
    pending: dict[Any, tuple[str, int]], groups: list[list[int]], progress: Progress
) -> Iterator[tuple[str, list[ScoredShards]]]:
    """Yield each model's name and what its tasks found, as soon as all of them are done."""
    num_shards = sum(len(group) for group in groups)
    found: dict[str, dict[int, ScoredShards]] = {name: {} for name, _ in pending.values()}
    try:
        while pending:
            (ready,), _ = ray.wait(list(pending), num_returns=1)
            name, index = pending[ready]
            found[name][index] = _fetch(ready)
            del pending[ready]
            done = sum(len(groups[i]) for i in found[name])
            progress(f"evaluate {name}", done, num_shards, "shards")
            if done == num_shards:
                yield name, [found[name][i] for i in range(len(groups))]
    finally:
        for reference in pending:  # after an error: what is still running would be lost anyhow
            ray.cancel(reference)


def _ask_models(recipe: Recipe, layout: Layout, progress: Progress) -> None:
    """Ask every model what it has no score at: one Ray task a model, the ensemble afterwards."""
    ask: dict[str, LmEvalJob] = {}
    present = layout.store.sizes("evaluate")
    for name, files in layout.task_scores.items():
        costs = layout.task_costs.get(name, {})
        wanted = {task: file for task, file in files.items() if _base(file) not in present}
        if name != ENSEMBLE:
            for task, file in costs.items():
                if _base(file) not in present:
                    wanted[task] = files[task]
        if wanted:
            ask[name] = LmEvalJob(name, recipe.evaluate, layout.store, wanted, costs)
    _run_asked(
        {
            name: ray.remote(**_resource_options(describe_model(recipe, name, layout), recipe))(
                ask_model
            ).remote(task, _plan_task(recipe, layout, name))
            for name, task in ask.items()
            if name != ENSEMBLE
        },
        progress,
    )
    if ENSEMBLE in ask:
        sources = list(layout.task_costs.values())
        pending = ray.remote(max_retries=TASK_RETRIES)(ask_ensemble).remote(ask[ENSEMBLE], sources)
        _run_asked({ENSEMBLE: pending}, progress)


def _run_asked(pending: dict[str, Any], progress: Progress) -> None:
    """Wait for models that are asked tasks."""
    names = {reference: name for name, reference in pending.items()}
    waiting = list(names)
    try:
        while waiting:
            (ready,), waiting = ray.wait(waiting, num_returns=1)
            number = _fetch(ready)
            progress(f"ask {names[ready]}", number, number, "tasks")
    finally:
        for reference in waiting:
            ray.cancel(reference)


def _base(file: str) -> str:
    return file.rpartition("/")[2]


def _merge_models(recipe: Recipe, layout: Layout) -> Any:
    """Begin to average the weights, unless they are there, and return what to wait for."""
    folder = layout.merge.folder
    assert folder is not None, "there is no model merged"
    if "done.json" in layout.store.sizes(folder):
        return None
    sources = [source for source in recipe.sources if source.name in layout.merge.sources]
    merge: Any = ray.remote(max_retries=TASK_RETRIES)(merge_models)
    return merge.remote([recipe.target, *sources], layout.store, folder)


def _plan_groups(recipe: Recipe, layout: Layout) -> list[list[int]]:
    if not layout.held_out.is_complete():
        raise ValueError("the held-out rows are not whole; run `rayfuse corpus` first")
    groups = group_shards(layout.held_out.commits().values(), recipe.corpus.shard_tokens)
    if not groups:
        raise ValueError("there are no held-out rows; raise evaluate.held_out_share")
    return groups


def _plan_task(recipe: Recipe, layout: Layout, name: str) -> ScoringJob:
    for run in layout.runs:
        if run.name == name and "done.json" not in layout.store.sizes(run.folder):
            raise ValueError(f"the model {name} is not trained; run `rayfuse train` first")
    return ScoringJob(
        name=name,
        model=describe_model(recipe, name, layout),
        held_out=layout.held_out,
        batch_tokens=recipe.evaluate.batch_tokens,
        own_folder=find_own_folder(name, layout),
        costs=layout.token_nll.get(name),
    )


def _is_evaluated(layout: Layout, name: str) -> bool:
    folder, _, file = layout.evaluations[name].rpartition("/")
    return file in layout.store.sizes(folder)


def _join_parts(name: str, model: str, parts: list[ScoredShards]) -> Evaluation:
    documents = sum_documents(document for part in parts for document in part.documents)
    seconds = sum(part.seconds for part in parts)
    return Evaluation(name, find_role(name), model, documents, seconds)


def _fetch(reference: Any) -> Any:
    """Return a task's result; its ValueError comes back as itself, without Ray's frame."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise error.cause from error
        raise


def _resource_options(model: ModelSettings, recipe: Recipe) -> dict[str, Any]:
    """Return what a task asks of Ray: as its actors do for a source, else as a training worker."""
    if isinstance(model, SourceSettings):
        kind, cpus, gpus = model.accelerator_type, model.cpus, count_actor_gpus(model)
    else:
        kind, cpus = recipe.train.accelerator_type, 1.0
        gpus = count_default_gpus(kind)
    return {"num_cpus": cpus, "max_retries": TASK_RETRIES} | gpu_options(gpus, kind)


def score_shards(task: ScoringJob, shards: list[int], made: object = None) -> ScoredShards:
    """Score held-out shards with one model; run by Ray, which finds the function by this name.

    Args:
        task: The model.
        shards: Their numbers.
        made: What makes the model first, for Ray to wait for.
    """
    import torch

    from rayfuse.evaluate.bits_per_byte import (
        load_scored_model,
        score_documents,
        score_tokens,
        sum_rows,
    )
    from rayfuse.evaluate.ensemble import build_costs, read_costs

    began, num_rows, num_tokens = time.monotonic(), 0, 0
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    torch.set_num_threads(max(1, int(cpus)))
    documents: list[DocumentScore] = []
    with local_model(task) as model:
        lm, tokenizer = load_scored_model(model), load_recipe_tokenizer(model)
        for shard in shards:
            rows = task.held_out.read_shard(task.held_out.read_commit(shard))
            if task.costs is not None and task.costs.is_committed(shard):
                costs = read_costs(_read_alike(task.costs, shard, rows))
            else:
                costs = score_tokens(
                    lm,
                    tokenizer,
                    rows,
                    name=task.name,
                    batch_tokens=task.batch_tokens,
                    context_tokens=read_model_files(model.model, model.revision).context_tokens,
                )
            if task.costs is not None:
                table = build_costs(rows["row_id"].to_pylist(), costs)
                task.costs.write_shard(shard, table, tokens=sum(len(row.ends) for row in costs))
            documents += score_documents(rows, sum_rows(costs))
            num_rows += len(costs)
            num_tokens += sum(len(row.ends) for row in costs)
    seconds = time.monotonic() - began
    count_work("evaluate", task.name, rows=num_rows, tokens=num_tokens, seconds=seconds)
    run = task.held_out.store.root
    log_event("scored", run=run, stage="evaluate", model=task.name, shards=len(shards))
    return ScoredShards(sum_documents(documents), seconds)


def average_shards(held_out: DataSet, costs: list[DataSet], shards: list[int]) -> ScoredShards:
    """Score held-out shards with the ensemble of models that have scored them; run by Ray."""
    from rayfuse.evaluate.bits_per_byte import score_documents, sum_rows
    from rayfuse.evaluate.ensemble import average_sources, read_costs

    began = time.monotonic()
    documents: list[DocumentScore] = []
    for shard in shards:
        rows = held_out.read_shard(held_out.read_commit(shard))
        sources = [read_costs(_read_alike(data, shard, rows)) for data in costs]
        costs_of_rows = [average_sources(row) for row in zip(*sources, strict=True)]
        documents += score_documents(rows, sum_rows(costs_of_rows))
    return ScoredShards(sum_documents(documents), time.monotonic() - began)


def _read_alike(data: DataSet, shard: int, rows: pa.Table) -> pa.Table:
    """Return a shard that holds the same rows as another table.

    Raises:
        ShardError: It is missing or damaged.
        ValueError: It holds other rows.
    """
    table = data.read_shard(data.read_commit(shard))
    if not table["row_id"].equals(rows["row_id"]):
        raise ValueError(
            f"{data.store.root}/{data.folder}: shard {shard} holds other rows than the held-out "
            "text; remove the folder and evaluate again"
        )
    return table


def merge_models(models: list[ModelSettings], store: Store, folder: str) -> None:
    """Put the model of averaged weights below a folder of a store, `done.json` last; run by Ray."""
    from rayfuse.evaluate.merged_weights import average_weights

    with tempfile.TemporaryDirectory(prefix="rayfuse-merged-") as merged:
        average_weights([find_folder(model) for model in models], Path(merged))
        for file in sorted(Path(merged).iterdir()):
            store.upload(str(file), f"{folder}/model/{file.name}")
    store.write(f"{folder}/done.json", b"{}")
