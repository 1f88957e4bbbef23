"""Tasks by name, through lm-eval: found, checked, asked."""

import difflib
import logging
import random
from pathlib import Path
from typing import Any

from rayfuse.config.evaluate import EvaluateSettings, TasksSettings
from rayfuse.evaluate.sandbox import check_sandbox
from rayfuse.evaluate.task_scores import SubtaskScore, read_samples

FEWSHOT_SEED = 1234
"""Of the examples before a question, lm-eval's own default."""


def open_manager(settings: TasksSettings) -> Any:
    """Return lm-eval's manager of tasks; its own ten thousand are listed only if they are needed.

    Raises:
        ValueError: A name is known to neither the folder nor lm-eval.
    """
    from lm_eval.tasks import TaskManager

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
            # Of the folder first: whoever has one most likely means its tasks.
            near = [
                *difflib.get_close_matches(name, local.all_tasks, n=1),
                *difflib.get_close_matches(name, manager.all_tasks, n=1),
            ]
            remedy = f"did you mean {near[0]!r}?" if near else "`lm-eval ls tasks` lists them"
            raise ValueError(f"evaluate.tasks.names has {name!r}, which is no task; {remedy}")
    return manager


def check_tasks(settings: EvaluateSettings) -> None:
    """Load every task, so that what is wrong with one is known before a cluster is asked for.

    Raises:
        ValueError: A task is unknown, cannot be loaded, or runs code that models write where that
            is not allowed.
    """
    if settings.tasks is None:
        return
    manager = open_manager(settings.tasks)
    for name in settings.tasks.names:
        for subtask, task in load_tasks(manager, name).items():
            if getattr(task, "UNSAFE_CODE", False):
                _check_code(name, subtask, settings, task.config.metadata or {})


def _check_code(
    name: str, subtask: str, settings: EvaluateSettings, metadata: dict[str, Any]
) -> None:
    """Allow a task that runs code only where the recipe does, and in our sandbox alone."""
    if not settings.run_generated_code:
        raise ValueError(
            f"evaluate.tasks.names has {name!r}: {subtask} runs code that models write; "
            "set evaluate.run_generated_code: true, or remove the task"
        )
    if metadata.get("sandboxed") is not True:
        raise ValueError(
            f"evaluate.tasks.names has {name!r}: {subtask} runs code that models write outside "
            "any sandbox; take a definition that uses rayfuse.evaluate.sandbox and says so "
            "(metadata: {sandboxed: true}), as recipes/tasks/humaneval.yaml does"
        )
    check_sandbox()


def load_tasks(manager: Any, name: str) -> dict[str, Any]:
    """Return the tasks of one name: itself, or those of a group or a tag.

    Raises:
        ValueError: One cannot be loaded: its data is not there, or its definition is wrong.
    """
    try:
        return manager.load([name])["tasks"]
    except Exception as error:  # definitions are foreign code and data comes from anywhere
        raise ValueError(
            f"the task {name} cannot be loaded ({type(error).__name__}: {error}); check "
            "evaluate.tasks.data, and that the machine reaches the hub if the set is there"
        ) from error


def ask_tasks(
    model: Any, manager: Any, name: str, settings: EvaluateSettings
) -> list[SubtaskScore]:
    """Return a model's scores at all tasks of one name.

    Args:
        model: An `LM` of lm-eval.
        manager: Of `open_manager`.
        name: A task, group or tag.
        settings: How many examples and questions, and whether generated code may run.
    """
    from lm_eval.evaluator import evaluate

    assert settings.tasks is not None, "there are tasks to ask"
    random.seed(0)
    tasks = load_tasks(manager, name)
    for task in tasks.values():
        own = task.get_config("num_fewshot")
        given = settings.tasks.num_fewshot
        # A definition that says 0 has its reasons: lm-eval does not overrule it either.
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


def is_scored_by_loss(manager: Any, name: str) -> bool:
    """Return whether a name's tasks ask for nothing but log-probabilities of texts."""
    kinds = {task.OUTPUT_TYPE for task in load_tasks(manager, name).values()}
    return kinds <= {"multiple_choice", "loglikelihood_rolling"}
