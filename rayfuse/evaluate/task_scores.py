"""What models score at tasks, question by question, and how sure a difference is."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from rayfuse.evaluate.scores import Difference, bootstrap


@dataclass(frozen=True)
class SubtaskScore:
    """One model at one task of lm-eval, by one metric."""

    subtask: str
    metric: str
    """As lm-eval names it, its filter behind it."""
    higher_is_better: bool
    value: float
    """Over all questions, as lm-eval has it."""
    questions: tuple[str, ...]
    """Hash of each question."""
    values: tuple[float, ...]
    """Of each question; none where the metric is not made of questions' own."""
    weights: tuple[float, ...]
    """The score is sum(values) / sum(weights)."""


@dataclass(frozen=True)
class TaskScore:
    """One model at one name of the recipe: a task, or a group of them."""

    name: str
    """Of the model, as in tables."""
    task: str
    subtasks: tuple[SubtaskScore, ...]
    """Every task and metric; a task's first metric comes first."""
    seconds: float

    def list_main(self) -> list[SubtaskScore]:
        """Return each task's first metric."""
        firsts: dict[str, SubtaskScore] = {}
        for each in self.subtasks:
            firsts.setdefault(each.subtask, each)
        return list(firsts.values())

    @property
    def value(self) -> float:
        """The mean of the tasks, by their first metric; NaN where the model was not asked."""
        values = [each.value for each in self.list_main()]
        return float(np.mean(values)) if values else math.nan

    @property
    def higher_is_better(self) -> bool:
        """Which way the score is good."""
        return self.list_main()[0].higher_is_better

    def to_json(self) -> bytes:
        """Return the result file."""
        return json.dumps(asdict(self)).encode()


def parse_task_score(data: bytes) -> TaskScore:
    """Return the score that a result file holds."""
    record: dict[str, Any] = json.loads(data)
    lists = ("questions", "values", "weights")
    subtasks = [
        SubtaskScore(**each | {name: tuple(each[name]) for name in lists})
        for each in record["subtasks"]
    ]
    return TaskScore(record["name"], record["task"], tuple(subtasks), record["seconds"])


def read_samples(
    subtask: str,
    samples: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any],
    higher_is_better: Mapping[str, bool | None],
) -> list[SubtaskScore]:
    """Return one task's scores from what lm-eval says of it, the definition's first metric first.

    A metric that is the mean of its questions is kept question by question. One over bytes or
    words (`bits_per_byte`) is kept as lm-eval gives it, as pairs; others have no questions.

    Args:
        subtask: The task's name.
        samples: lm-eval's samples, one a question and filter.
        results: lm-eval's results by `METRIC,FILTER`.
        higher_is_better: By metric, in the definition's order.
    """
    order = list(higher_is_better)
    scores: list[SubtaskScore] = []
    for key, value in results.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        own = [each for each in samples if each["filter"] == filter_name and metric in each]
        pairs = [_read_value(metric, each[metric]) for each in own]
        known = [pair for pair in pairs if pair is not None]
        is_complete = bool(own) and len(known) == len(pairs)
        scores.append(
            SubtaskScore(
                subtask,
                metric if filter_name == "none" else f"{metric} ({filter_name})",
                bool(higher_is_better.get(metric, True)),
                float(value),
                tuple(each["doc_hash"] for each in own),
                tuple(pair[0] for pair in known) if is_complete else (),
                tuple(pair[1] for pair in known) if is_complete else (),
            )
        )
    scores.sort(key=lambda each: _place(each.metric.partition(" ")[0], order))
    return [_check_sum(each) for each in scores]


def _place(metric: str, order: Sequence[str]) -> int:
    return order.index(metric) if metric in order else len(order)


def _read_value(metric: str, value: Any) -> tuple[float, float] | None:
    """Return a question's value and weight."""
    if isinstance(value, bool | int | float | np.number):
        return float(value), 1.0
    if metric == "bits_per_byte":
        logprob, num_bytes = value
        return -float(logprob) / math.log(2), float(num_bytes)
    return None


def _check_sum(score: SubtaskScore) -> SubtaskScore:
    """Drop the questions of a metric that is not their mean: no interval can be had from them."""
    mean = sum(score.values) / sum(score.weights) if score.values else math.nan
    is_mean = math.isclose(mean, score.value, rel_tol=1e-6, abs_tol=1e-9)
    return score if is_mean else replace(score, values=(), weights=())


def compare_tasks(a: TaskScore, b: TaskScore, *, samples: int, seed: int) -> Difference:
    """Return by how much `a` scores more than `b`, with the interval of a paired bootstrap.

    Questions are drawn with replacement, those of all tasks of a group together; each task weighs
    the same. Without questions of their own metrics have no interval.

    Raises:
        ValueError: The models were asked different questions.
    """
    values: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    for ours, theirs in zip(a.list_main(), b.list_main(), strict=True):
        if ours.questions != theirs.questions or ours.weights != theirs.weights:
            raise ValueError(
                f"{a.name} and {b.name} were asked different questions of {ours.subtask}; delete "
                "both result files and evaluate again"
            )
        own = np.array(ours.weights, dtype=np.float64)
        share = own.sum() if len(own) else 1.0
        values.append((np.array(ours.values) - np.array(theirs.values)) / share)
        weights.append(own / share)
    all_values, all_weights = np.concatenate(values), np.concatenate(weights)
    if not all(len(each) for each in values):
        number = len(all_values)
        return Difference(a.value - b.value, -math.inf, math.inf, number, a.higher_is_better)
    found = bootstrap(all_values, all_weights, samples=samples, seed=seed)
    return replace(found, higher_is_better=a.higher_is_better)
