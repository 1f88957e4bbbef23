"""What a worker does to ask one model tasks, and the ensemble after its sources."""

import io
import time
from dataclasses import dataclass

import pyarrow.parquet as pq

from rayfuse.config.evaluate import EvaluateSettings
from rayfuse.evaluate.model_loading import ScoringJob, local_model
from rayfuse.models.files import load_recipe_tokenizer, read_model_files
from rayfuse.storage.store import Store


@dataclass(frozen=True)
class LmEvalJob:
    """One model, and what it is to be asked."""

    name: str
    settings: EvaluateSettings
    store: Store
    files: dict[str, str]
    """By task: where its score goes."""
    costs: dict[str, str]
    """By task: where a source of the ensemble leaves what it pays token by token."""


def ask_model(task: LmEvalJob, model: ScoringJob) -> int:
    """Ask a model its tasks, store each score, and return how many; run by Ray.

    Raises:
        ValueError: A task or the model cannot be used.
    """
    from rayfuse.evaluate.bits_per_byte import load_scored_model
    from rayfuse.evaluate.ensemble import build_costs
    from rayfuse.evaluate.lm_eval_model import TextLM
    from rayfuse.evaluate.lm_eval_tasks import ask_tasks, open_manager
    from rayfuse.evaluate.task_scores import TaskScore

    assert task.settings.tasks is not None, "there are tasks to ask"
    manager = open_manager(task.settings.tasks)
    with local_model(model) as held:
        lm, tokenizer = load_scored_model(held), load_recipe_tokenizer(held)
        context_tokens = read_model_files(held.model, held.revision).context_tokens
        for name, file in task.files.items():
            began = time.monotonic()
            asked = TextLM(
                lm,
                tokenizer,
                batch_tokens=task.settings.batch_tokens,
                context_tokens=context_tokens,
            )
            subtasks = tuple(ask_tasks(asked, manager, name, task.settings))
            if name in task.costs:
                sink = io.BytesIO()
                ids = [str(number) for number in range(len(asked.costs))]
                pq.write_table(build_costs(ids, asked.costs), sink, compression="zstd")
                task.store.write(task.costs[name], sink.getvalue())
            score = TaskScore(task.name, name, subtasks, time.monotonic() - began)
            task.store.write(file, score.to_json())
    return len(task.files)


def ask_ensemble(task: LmEvalJob, sources: list[dict[str, str]]) -> int:
    """Store the ensemble's score at each task, from what its sources have paid; run by Ray.

    Tasks that let models write are not asked: sources of other tokens cannot write together. Their
    score is there without anything in it.

    Args:
        task: The ensemble.
        sources: By task, where each source has left its costs.
    """
    from rayfuse.evaluate.ensemble import read_costs
    from rayfuse.evaluate.lm_eval_model import EnsembleLM
    from rayfuse.evaluate.lm_eval_tasks import ask_tasks, is_scored_by_loss, open_manager
    from rayfuse.evaluate.task_scores import SubtaskScore, TaskScore

    assert task.settings.tasks is not None, "there are tasks to ask"
    manager = open_manager(task.settings.tasks)
    for name, file in task.files.items():
        began = time.monotonic()
        subtasks: list[SubtaskScore] = []
        if is_scored_by_loss(manager, name):
            costs = [
                read_costs(pq.read_table(io.BytesIO(task.store.read(files[name]))))
                for files in sources
            ]
            subtasks = ask_tasks(EnsembleLM(costs), manager, name, task.settings)
        score = TaskScore(task.name, name, tuple(subtasks), time.monotonic() - began)
        task.store.write(file, score.to_json())
    return len(task.files)
