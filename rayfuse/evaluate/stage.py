"""The evaluate stage: Ray tasks score the held-out rows with every model of the run."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import torch

from rayfuse.config.base import UserError
from rayfuse.config.models import ModelSettings
from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.evaluate.answer_nll import score_answers
from rayfuse.evaluate.bits_per_byte import (
    load_scored_model,
    score_documents,
    score_tokens,
    sum_rows,
)
from rayfuse.evaluate.ensemble import average_sources, build_nll_table, read_nll_table
from rayfuse.evaluate.merged_weights import merge_models
from rayfuse.evaluate.model_loading import check_trained, local_model
from rayfuse.evaluate.results import (
    describe_role,
    is_scored,
    read_evaluation,
    read_inputs,
    read_task_inputs,
)
from rayfuse.evaluate.scores import DocumentScore, Evaluation
from rayfuse.evaluate.task_resources import choose_resources
from rayfuse.models.chat import load_chat_format
from rayfuse.models.config_file import read_context_tokens
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.run.layout import Layout, describe_model, find_own_folder
from rayfuse.run.made_models import is_made
from rayfuse.runtime.heap import trim_heap
from rayfuse.runtime.logging import log_event
from rayfuse.runtime.metrics import count_work
from rayfuse.runtime.progress import Progress, ProgressEvent, ShouldStop, never_stop
from rayfuse.runtime.resources import (
    TASK_RETRIES,
)
from rayfuse.runtime.wait import TaskWait, fetch_result
from rayfuse.storage.chat_columns import has_answers
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.manifest import Commit, check_inputs
from rayfuse.storage.seal import REMEDY, ShardError

ENSEMBLE, MERGED = "ensemble", "merged"


@dataclass(frozen=True)
class ScoringJob:
    """Everything that a worker needs to score held-out rows with one model."""

    name: str
    """The model's name in tables."""
    model: ModelSettings
    held_out: DataSet
    batch_tokens: int
    own_folder: str | None
    """The model's folder below the storage root; None for a model that this run has not made."""
    token_nll: DataSet | None = None
    """Where a source of the ensemble stores its token NLL."""


@dataclass(frozen=True)
class ScoredShards:
    """The result of one task."""

    documents: list[DocumentScore]
    seconds: float
    """Computing time, loading the model included."""


def evaluate_models(
    recipe: Recipe, layout: Layout, progress: Progress, should_stop: ShouldStop = never_stop
) -> dict[str, Evaluation]:
    """Score every model that has no result yet, all in parallel, and read all results by name.

    Args:
        recipe: The recipe.
        layout: Its run.
        progress: Receives an event after each task.
        should_stop: Once it returns True, the stage stops after the next stored score.

    Raises:
        StoppedEarly: It has stopped, as it was to.
        UserError: The held-out rows are incomplete or empty, a model is not trained yet, or a model
            or a task cannot be used.
    """
    wait = TaskWait(should_stop)
    names = [
        name
        for name, file in layout.evaluation.scores.items()
        if not is_scored(layout.store, file, read_inputs(layout, name))
    ]
    if names:
        groups = _plan_groups(recipe, layout)
        if ENSEMBLE in names:
            names += _claim_token_nll(recipe, layout, groups, names)
        models = [name for name in names if name != ENSEMBLE]
        _score_models(recipe, layout, models, groups, progress, wait)
        if ENSEMBLE in names:
            _score_ensemble(layout, groups, progress, wait)
    if recipe.evaluate.tasks is not None:
        _score_tasks(recipe, layout, progress, wait)
    return {name: read_evaluation(layout, file) for name, file in layout.evaluation.scores.items()}


def _claim_token_nll(
    recipe: Recipe, layout: Layout, groups: list[list[int]], names: list[str]
) -> list[str]:
    """Claim the sources' token NLL, and list the sources to score again because shards lack it."""
    shards = {shard for group in groups for shard in group}
    incomplete: list[str] = []
    for name, token_nll in layout.evaluation.token_nll.items():
        token_nll.claim({"recipe": dump_recipe(recipe), "source": name})
        made_from = {shard: commit.inputs for shard, commit in token_nll.commits().items()}
        token_nll.drop_shards(token_nll.find_stale(made_from))
        if shards - token_nll.list_committed() and name not in names:
            incomplete.append(name)
    return incomplete


def group_shards(commits: Iterable[Commit], task_tokens: int) -> list[list[int]]:
    """Group shards into runs of about `task_tokens`, one run per task; empty shards are skipped.

    A corpus of many small files has many small held-out shards, and loading the model would take
    longer than scoring one of them.
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
    recipe: Recipe,
    layout: Layout,
    names: list[str],
    groups: list[list[int]],
    progress: Progress,
    wait: TaskWait,
) -> None:
    jobs = {name: _plan_job(recipe, layout, name) for name in names}
    pending: dict[Any, tuple[str, int]] = {}
    for name, job in jobs.items():
        merge = _start_merge(recipe, layout) if name == MERGED else None
        remote: Any = ray.remote(**choose_resources(job.model, recipe))(score_shards)
        pending |= {remote.remote(job, group, merge): (name, i) for i, group in enumerate(groups)}
    for name, parts in _gather(pending, groups, progress, wait):
        evaluation = _join_parts(layout, name, jobs[name].model.model, parts)
        layout.store.write(layout.evaluation.scores[name], evaluation.to_json())


def _score_ensemble(
    layout: Layout, groups: list[list[int]], progress: Progress, wait: TaskWait
) -> None:
    average: Any = ray.remote(max_retries=TASK_RETRIES)(average_shards)
    token_nll = list(layout.evaluation.token_nll.values())
    pending = {
        average.remote(layout.held_out, token_nll, group): (ENSEMBLE, i)
        for i, group in enumerate(groups)
    }
    for name, parts in _gather(pending, groups, progress, wait):
        models = ", ".join(layout.evaluation.token_nll)
        evaluation = _join_parts(layout, name, models, parts)
        layout.store.write(layout.evaluation.scores[name], evaluation.to_json())


def _gather(
    pending: dict[Any, tuple[str, int]],
    groups: list[list[int]],
    progress: Progress,
    wait: TaskWait,
) -> Iterator[tuple[str, list[ScoredShards]]]:
    """Yield each model's name and its tasks' results, as soon as all of its tasks are done.

    The caller stores its score before it takes the next; only then the command may stop.
    """
    num_shards = sum(len(group) for group in groups)
    found: dict[str, dict[int, ScoredShards]] = {name: {} for name, _ in pending.values()}
    try:
        while pending:
            ready, _ = wait.take_ready(list(pending))
            name, index = pending[ready]
            found[name][index] = fetch_result(ready, ValueError, ShardError)
            del pending[ready]
            done = sum(len(groups[i]) for i in found[name])
            seconds = sum(part.seconds for part in found[name].values())
            if done == num_shards:
                yield name, [found[name][i] for i in range(len(groups))]
            progress(
                ProgressEvent("evaluate", name, done, num_shards, "shards", worker_seconds=seconds)
            )
            if done == num_shards:
                wait.check_stored()
    finally:
        for reference in pending:  # after an error the results of running tasks would be lost
            ray.cancel(reference)


def _score_tasks(recipe: Recipe, layout: Layout, progress: Progress, wait: TaskWait) -> None:
    """Run the tasks without a score: one Ray task per model, then one for the ensemble."""
    # lm-eval is an optional dependency (rayfuse[tasks]).
    from rayfuse.evaluate.lm_eval_tasks import LmEvalJob, run_ensemble_job, run_model_job

    store = layout.store
    present = store.sizes("evaluate")
    jobs: dict[str, LmEvalJob] = {}
    for name, score_files in layout.evaluation.task_scores.items():
        nll_files = layout.evaluation.task_nll.get(name, {})
        inputs = read_task_inputs(layout, name)
        missing = {
            task: file
            for task, file in score_files.items()
            if not is_scored(store, file, inputs)
            or (task in nll_files and _base(nll_files[task]) not in present)
        }
        if missing:
            jobs[name] = LmEvalJob(name, recipe, store, missing, nll_files, inputs)
    pending: dict[Any, str] = {}
    for name, job in jobs.items():
        if name != ENSEMBLE:
            check_trained(recipe, layout, name)
            model = describe_model(recipe, name, layout)
            remote: Any = ray.remote(**choose_resources(model, recipe))(run_model_job)
            pending[remote.remote(job, model, find_own_folder(name, layout))] = name
    _wait_for_jobs(pending, progress, wait)
    if ENSEMBLE in jobs:
        sources = [
            {
                task: (layout.evaluation.task_scores[name][task], file)
                for task, file in files.items()
            }
            for name, files in layout.evaluation.task_nll.items()
        ]
        remote = ray.remote(max_retries=TASK_RETRIES)(run_ensemble_job)
        _wait_for_jobs({remote.remote(jobs[ENSEMBLE], sources): ENSEMBLE}, progress, wait)


def _wait_for_jobs(names: dict[Any, str], progress: Progress, wait: TaskWait) -> None:
    waiting = list(names)
    try:
        while waiting:
            ready, waiting = wait.take_ready(waiting)
            number = fetch_result(ready, ValueError, ShardError)
            part = f"tasks of {names[ready]}"
            progress(ProgressEvent("evaluate", part, number, number, "tasks"))
            wait.check_stored()
    finally:
        for reference in waiting:
            ray.cancel(reference)


def _base(file: str) -> str:
    return file.rpartition("/")[2]


def _start_merge(recipe: Recipe, layout: Layout) -> Any:
    """Start to average the weights, and return the task's reference; None where it is done."""
    folder = layout.evaluation.merge.folder
    assert folder is not None, "no model is merged"
    if is_made(layout.store, folder, {}):
        return None
    sources = [
        source for source in recipe.sources if source.name in layout.evaluation.merge.sources
    ]
    merge: Any = ray.remote(max_retries=TASK_RETRIES)(merge_models)
    return merge.remote([recipe.target, *sources], layout.store, folder)


def _plan_groups(recipe: Recipe, layout: Layout) -> list[list[int]]:
    if not layout.held_out.is_complete():
        raise UserError("the held-out rows are incomplete; run `rayfuse corpus` first")
    groups = group_shards(layout.held_out.commits().values(), recipe.corpus.shard_tokens)
    if not groups:
        raise UserError("there are no held-out rows; raise evaluate.held_out_share")
    return groups


def _plan_job(recipe: Recipe, layout: Layout, name: str) -> ScoringJob:
    check_trained(recipe, layout, name)
    return ScoringJob(
        name=name,
        model=describe_model(recipe, name, layout),
        held_out=layout.held_out,
        batch_tokens=recipe.evaluate.batch_tokens,
        own_folder=find_own_folder(name, layout),
        token_nll=layout.evaluation.token_nll.get(name),
    )


def _join_parts(layout: Layout, name: str, model: str, parts: list[ScoredShards]) -> Evaluation:
    documents = [document for part in parts for document in part.documents]
    seconds, inputs = sum(part.seconds for part in parts), read_inputs(layout, name)
    return Evaluation(name, describe_role(layout, name), model, documents, seconds, inputs)


def score_shards(job: ScoringJob, shards: list[int], merge: object = None) -> ScoredShards:
    """Score held-out shards with one model; a Ray task.

    Args:
        job: The model.
        shards: Their numbers.
        merge: The result of the task that makes the model. It is unused: Ray starts a task only
            once its arguments exist.
    """
    began, num_rows, num_tokens = time.monotonic(), 0, 0
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    torch.set_num_threads(max(1, int(cpus)))
    documents: list[DocumentScore] = []
    with local_model(job.model, job.held_out.store, job.own_folder) as model:
        lm, tokenizer = load_scored_model(model), load_recipe_tokenizer(model)
        trim_heap()
        for shard in shards:
            commit = job.held_out.read_commit(shard)
            rows = job.held_out.read_shard(commit)
            if job.token_nll is not None and job.token_nll.is_committed(shard):
                token_nll = read_nll_table(_read_same_rows(job.token_nll, commit, rows))
            else:
                score = (
                    partial(score_answers, lm, load_chat_format(model))
                    if has_answers(rows)
                    else partial(score_tokens, lm, tokenizer)
                )
                token_nll = score(
                    rows,
                    name=job.name,
                    batch_tokens=job.batch_tokens,
                    context_tokens=read_context_tokens(model),
                )
            shard_tokens = sum(len(row.ends) for row in token_nll)
            if job.token_nll is not None:
                table = build_nll_table(rows["row_id"].to_pylist(), token_nll)
                job.token_nll.write_shard(
                    shard, table, tokens=shard_tokens, inputs={"corpus": commit.identity}
                )
            documents += score_documents(rows, sum_rows(token_nll))
            num_rows += len(token_nll)
            num_tokens += shard_tokens
    seconds = time.monotonic() - began
    count_work("evaluate", job.name, rows=num_rows, tokens=num_tokens, seconds=seconds)
    run = job.held_out.store.root
    log_event("scored", run=run, stage="evaluate", model=job.name, shards=len(shards))
    return ScoredShards(documents, seconds)


def average_shards(held_out: DataSet, token_nll: list[DataSet], shards: list[int]) -> ScoredShards:
    """Score held-out shards with the ensemble, from its sources' token NLL; a Ray task."""
    began = time.monotonic()
    documents: list[DocumentScore] = []
    for shard in shards:
        commit = held_out.read_commit(shard)
        rows = held_out.read_shard(commit)
        sources = [read_nll_table(_read_same_rows(data, commit, rows)) for data in token_nll]
        ensemble = [average_sources(row) for row in zip(*sources, strict=True)]
        documents += score_documents(rows, sum_rows(ensemble))
    return ScoredShards(documents, time.monotonic() - began)


def _read_same_rows(data: DataSet, rows_commit: Commit, rows: pa.Table) -> pa.Table:
    """Read the shard that was made from held-out rows, and check that it holds the same rows.

    Raises:
        ShardError: It is missing or corrupt, or holds other rows.
    """
    shard = rows_commit.shard
    commit = data.read_commit(shard)
    check_inputs(commit, {"corpus": rows_commit}, data.folder)
    table = data.read_shard(commit)
    if not table["row_id"].equals(rows["row_id"]):
        raise ShardError(
            f"{data.store.root}/{data.folder}: shard {shard} holds other rows than the held-out "
            f"text; {REMEDY}"
        )
    return table
