"""Tasks of lm-eval: find and check them, and run them for a model or for the ensemble.

lm-eval is an optional dependency: only code that runs tasks may import this module.
"""

import difflib
import io
import logging
import random
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from rayfuse.config.base import UserError, first_line, user_error_from
from rayfuse.config.evaluate import EvaluateSettings, TasksSettings
from rayfuse.config.models import ModelSettings
from rayfuse.config.recipe import Recipe
from rayfuse.evaluate.bits_per_byte import load_scored_model
from rayfuse.evaluate.ensemble import build_nll_table, read_nll_table
from rayfuse.evaluate.lm_eval_model import EnsembleLM, TextLM
from rayfuse.evaluate.model_loading import local_model
from rayfuse.evaluate.results import read_task_nll
from rayfuse.evaluate.sandbox import check_sandbox
from rayfuse.evaluate.task_scores import SubtaskScore, TaskScore, parse_task_score, read_samples
from rayfuse.models.chat import load_chat_format
from rayfuse.models.config_file import read_context_tokens
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.storage.files import hash_bytes
from rayfuse.storage.parquet import read_parquet
from rayfuse.storage.store import Store

FEWSHOT_SEED = 1234
"""Seed of the few-shot examples: lm-eval's own default."""

LOGLIKELIHOOD_TYPES = {"multiple_choice", "loglikelihood_rolling"}


@dataclass(frozen=True)
class LmEvalJob:
    """The tasks that one model, or the ensemble, has yet to run."""

    name: str
    """The model's name in tables."""
    recipe: Recipe
    store: Store
    score_files: dict[str, str]
    """By task: the file of its score."""
    nll_files: dict[str, str]
    """By task: the file of a source's token NLL, from which the ensemble is computed."""
    inputs: dict[str, str] = field(default_factory=dict[str, str])
    """What the scores are made from: see `TaskScore`."""

    @property
    def settings(self) -> EvaluateSettings:
        """The recipe's settings of evaluation."""
        return self.recipe.evaluate


def open_task_manager(settings: TasksSettings) -> Any:
    """Open lm-eval's task manager on the recipe's folder.

    lm-eval's own ten thousand definitions take half a minute to index, so they are indexed only if
    the recipe names one that the folder does not have.

    Raises:
        UserError: Neither the folder nor lm-eval has a task of some name.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    options: dict[str, Any] = {
        "include_path": None if settings.folder is None else Path(settings.folder).expanduser(),
        "metadata": {} if settings.data is None else {"data": settings.data},
    }
    manager = TaskManager(**options, include_defaults=False)
    if all(name in manager.task_index for name in settings.names):
        return manager
    local, manager = manager, TaskManager(**options)
    for name in settings.names:
        if name not in manager.task_index:
            # The folder's tasks come first: a recipe with a folder most likely means one of them.
            near = [
                *difflib.get_close_matches(name, local.all_tasks, n=1),
                *difflib.get_close_matches(name, manager.all_tasks, n=1),
            ]
            remedy = f"did you mean {near[0]!r}?" if near else "`lm-eval ls tasks` lists them"
            raise UserError(f"evaluate.tasks.names has {name!r}, which is not a task; {remedy}")
    return manager


def check_tasks(settings: EvaluateSettings) -> None:
    """Load every task, so that a wrong one is reported before cluster resources are requested.

    Raises:
        UserError: A task is unknown, cannot be loaded, or runs model-written code where that is not
            allowed.
    """
    if settings.tasks is None:
        return
    manager = open_task_manager(settings.tasks)
    for name in settings.tasks.names:
        for subtask, task in load_tasks(manager, name).items():
            if getattr(task, "UNSAFE_CODE", False):
                _check_code(name, subtask, settings, task.config.metadata or {})


def _check_code(
    name: str, subtask: str, settings: EvaluateSettings, metadata: dict[str, Any]
) -> None:
    """Allow a task that runs code only where the recipe does, and only in rayfuse's sandbox."""
    if not settings.run_generated_code:
        raise UserError(
            f"evaluate.tasks.names has {name!r}: {subtask} runs model-written code; "
            "set evaluate.run_generated_code: true, or remove the task"
        )
    if metadata.get("sandboxed") is not True:
        raise UserError(
            f"evaluate.tasks.names has {name!r}: {subtask} runs model-written code outside any "
            "sandbox; use a definition that calls rayfuse.evaluate.sandbox and declares "
            "metadata: {sandboxed: true}, such as recipes/tasks/humaneval.yaml"
        )
    check_sandbox()


def load_tasks(manager: Any, name: str) -> dict[str, Any]:
    """Load the tasks of one name: the task itself, or those of a group or a tag.

    Raises:
        UserError: One cannot be loaded: its data is missing, or its definition is wrong.
    """
    with user_error_from(  # a definition is the user's code
        lambda error: UserError(
            f"the task {name} cannot be loaded ({type(error).__name__}: {error}); check "
            "evaluate.tasks.data, and that this machine reaches the hub if the data set is there"
        )
    ):
        return manager.load([name])["tasks"]


def read_questions(settings: TasksSettings) -> dict[str, list[str]]:
    """Read the texts of the questions that are scored, by task: what is asked, then the answer.

    Raises:
        UserError: A task is unknown, or cannot be loaded or read.
    """
    manager = open_task_manager(settings)
    found: dict[str, list[str]] = {}
    for name in settings.names:
        for subtask, task in load_tasks(manager, name).items():
            with user_error_from(  # a definition is the user's code
                lambda error, task=subtask: UserError(
                    f"the questions of the task {task} cannot be read ({first_line(error)})"
                )
            ):
                found[subtask] = [
                    _spell_question(task, doc) for doc in islice(task.eval_docs, settings.limit)
                ]
    return found


def _spell_question(task: Any, doc: Any) -> str:
    """Join what is asked and the answer; each may be the number of a choice."""
    parts: list[str] = []
    for part in (task.doc_to_text(doc), task.doc_to_target(doc)):
        chosen = task.doc_to_choice(doc)[part] if isinstance(part, int) else part
        parts += [chosen] if isinstance(chosen, str) else [str(text) for text in chosen]
    return " ".join(parts)


def run_tasks(
    model: Any, manager: Any, name: str, settings: EvaluateSettings
) -> list[SubtaskScore]:
    """Score a model at all tasks of one name.

    Args:
        model: An `LM` of lm-eval.
        manager: The result of `open_task_manager`.
        name: A task, group or tag.
        settings: Numbers of few-shot examples and questions, and whether generated code may run.
    """
    assert settings.tasks is not None, "there are no tasks to run"
    random.seed(0)
    tasks = load_tasks(manager, name)
    for task in tasks.values():
        own = task.get_config("num_fewshot")
        given = settings.tasks.num_fewshot
        # A definition with 0 examples is meant to have none: lm-eval does not overrule it either.
        number = own or 0 if given is None or own == 0 else given
        task.set_config(key="num_fewshot", value=number)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    found: Any = evaluate(
        model,
        {"tasks": tasks, "groups": {}, "group_map": {}},
        limit=settings.tasks.limit,
        bootstrap_iters=0,
        confirm_run_unsafe_code=settings.run_generated_code,
    )
    return [
        score
        for subtask, task in tasks.items()
        for score in read_samples(
            subtask,
            found["samples"][subtask],
            found["results"][subtask],
            task.higher_is_better(),
        )
    ]


def needs_only_logprobs(manager: Any, name: str) -> bool:
    """Check that the tasks of a name request log-probabilities of texts and no generated text."""
    kinds = {task.OUTPUT_TYPE for task in load_tasks(manager, name).values()}
    return kinds <= LOGLIKELIHOOD_TYPES


def run_model_job(job: LmEvalJob, model: ModelSettings, folder: str | None) -> int:
    """Run a model's tasks, store each score, and return their number; a Ray task.

    Args:
        job: The tasks.
        model: The model.
        folder: Its folder in the store, if this run has made it; see `local_model`.

    Raises:
        ValueError: A task or the model cannot be used.
    """
    assert job.settings.tasks is not None, "there are no tasks to run"
    manager = open_task_manager(job.settings.tasks)
    with local_model(model, job.store, folder) as local:
        lm, tokenizer = load_scored_model(local), load_recipe_tokenizer(local)
        context_tokens = read_context_tokens(local)
        for name, file in job.score_files.items():
            began = time.monotonic()
            text_lm = TextLM(
                lm,
                tokenizer,
                batch_tokens=job.settings.batch_tokens,
                context_tokens=context_tokens,
                chat=load_chat_format(model) if job.recipe.corpus.is_chat else None,
            )
            subtasks = tuple(run_tasks(text_lm, manager, name, job.settings))
            nll_sha256 = ""
            if name in job.nll_files:
                sink = io.BytesIO()
                ids = [str(number) for number in range(len(text_lm.token_nll))]
                table = build_nll_table(ids, text_lm.token_nll)
                pq.write_table(table, sink, compression="zstd")
                job.store.write(job.nll_files[name], sink.getvalue())
                nll_sha256 = hash_bytes(sink.getvalue())["sha256"]
            # The score is written last: its presence marks the task as complete.
            seconds = time.monotonic() - began
            score = TaskScore(job.name, name, subtasks, seconds, job.inputs, nll_sha256)
            job.store.write(file, score.to_json())
    return len(job.score_files)


def _read_nll(store: Store, score_file: str, nll_file: str) -> bytes:
    """Read a source's token NLL at a task, and check it against the score beside it."""
    score = parse_task_score(store.read(score_file), f"{store.root}/{score_file}")
    return read_task_nll(store, nll_file, score.nll_sha256)


def run_ensemble_job(job: LmEvalJob, sources: list[dict[str, tuple[str, str]]]) -> int:
    """Store the ensemble's score at each task, from its sources' token NLL; a Ray task.

    Generation tasks are skipped and get an empty score: sources with different tokenizers cannot
    generate one text together.

    Args:
        job: The tasks.
        sources: The files of each source's score and token NLL, by task.
    """
    assert job.settings.tasks is not None, "there are no tasks to run"
    manager = open_task_manager(job.settings.tasks)
    for name, file in job.score_files.items():
        began = time.monotonic()
        subtasks: list[SubtaskScore] = []
        if needs_only_logprobs(manager, name):
            token_nll = [
                read_nll_table(read_parquet(_read_nll(job.store, *files[name])))
                for files in sources
            ]
            subtasks = run_tasks(EnsembleLM(token_nll), manager, name, job.settings)
        seconds = time.monotonic() - began
        score = TaskScore(job.name, name, tuple(subtasks), seconds, job.inputs)
        job.store.write(file, score.to_json())
    return len(job.score_files)
