"""Scores of models on tasks, question by question, and their differences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from rayfuse.config.base import UserError
from rayfuse.evaluate.bootstrap import Difference, bootstrap
from rayfuse.storage.seal import seal, unseal


@dataclass(frozen=True)
class SubtaskScore:
    """One model on one task of lm-eval, by one metric."""

    subtask: str
    metric: str
    """lm-eval's name of the metric, and in brackets its filter of answers unless that is `none`."""
    higher_is_better: bool
    value: float
    """lm-eval's score over all questions."""
    questions: tuple[str, ...]
    """Hash of each question."""
    values: tuple[float, ...]
    """Numerator of each question; empty where the score is not a ratio of sums over questions."""
    weights: tuple[float, ...]
    """Denominator of each question: the score is sum(values) / sum(weights)."""


@dataclass(frozen=True)
class TaskScore:
    """One model on one entry of `evaluate.tasks.names`: a task, or a group of them."""

    name: str
    """The model's name in tables."""
    task: str
    subtasks: tuple[SubtaskScore, ...]
    """Every task and metric; a task's first metric comes first."""
    seconds: float
    inputs: dict[str, str] = field(default_factory=dict[str, str])
    """By input name, the hash of what it was made from: of a model that the run has made."""
    nll_sha256: str = ""
    """SHA-256 of the token NLL file beside this result; empty without one."""

    def list_first_metrics(self) -> list[SubtaskScore]:
        """List each task's first metric."""
        firsts: dict[str, SubtaskScore] = {}
        for score in self.subtasks:
            firsts.setdefault(score.subtask, score)
        return list(firsts.values())

    @property
    def value(self) -> float:
        """The mean over the tasks of their first metric; NaN where the model was not evaluated."""
        values = [score.value for score in self.list_first_metrics()]
        return float(np.mean(values)) if values else math.nan

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value is the better one."""
        return self.list_first_metrics()[0].higher_is_better

    def to_json(self) -> bytes:
        """Encode the result file."""
        return seal(asdict(self))


def parse_task_score(data: bytes, path: str = "the result") -> TaskScore:
    """Decode a result file.

    Args:
        data: Its bytes.
        path: Its path or URI, for errors.

    Raises:
        ShardError: It is corrupt.
    """
    record = unseal(data, path)
    lists = ("questions", "values", "weights")
    subtasks = [
        SubtaskScore(**subtask | {name: tuple(subtask[name]) for name in lists})
        for subtask in record["subtasks"]
    ]
    return TaskScore(
        record["name"],
        record["task"],
        tuple(subtasks),
        record["seconds"],
        record["inputs"],
        record["nll_sha256"],
    )


def read_samples(
    subtask: str,
    samples: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any],
    higher_is_better: Mapping[str, bool | None],
) -> list[SubtaskScore]:
    """Convert lm-eval's results of one task; the definition's first metric comes first.

    A metric that is the mean over its questions keeps a value per question, `bits_per_byte` keeps
    a pair of bits and bytes, made of lm-eval's log-likelihood and bytes; other metrics keep the
    total alone.

    Args:
        subtask: The task's name.
        samples: lm-eval's samples, one per question and filter.
        results: lm-eval's results by `METRIC,FILTER`.
        higher_is_better: By metric, in the definition's order.
    """
    order = list(higher_is_better)
    scores: list[SubtaskScore] = []
    for key, value in results.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        own = [sample for sample in samples if sample["filter"] == filter_name and metric in sample]
        pairs = [_read_value(metric, sample[metric]) for sample in own]
        known = [pair for pair in pairs if pair is not None]
        is_complete = bool(own) and len(known) == len(pairs)
        scores.append(
            SubtaskScore(
                subtask,
                metric if filter_name == "none" else f"{metric} ({filter_name})",
                bool(higher_is_better.get(metric, True)),
                float(value),
                tuple(sample["doc_hash"] for sample in own),
                tuple(pair[0] for pair in known) if is_complete else (),
                tuple(pair[1] for pair in known) if is_complete else (),
            )
        )
    scores.sort(key=lambda score: _rank(score.metric.partition(" ")[0], order))
    return [_drop_unexplained_values(score) for score in scores]


def _rank(metric: str, order: Sequence[str]) -> int:
    return order.index(metric) if metric in order else len(order)


def _read_value(metric: str, value: Any) -> tuple[float, float] | None:
    """Split a question's value into numerator and denominator, if it has them."""
    if isinstance(value, bool | int | float | np.number):
        return float(value), 1.0
    if metric == "bits_per_byte":
        logprob, num_bytes = value
        return -float(logprob) / math.log(2), float(num_bytes)
    return None


def _drop_unexplained_values(score: SubtaskScore) -> SubtaskScore:
    """Drop the values of the questions if the score is not their ratio: they give no interval."""
    mean = sum(score.values) / sum(score.weights) if score.values else math.nan
    is_mean = math.isclose(mean, score.value, rel_tol=1e-6, abs_tol=1e-9)
    return score if is_mean else replace(score, values=(), weights=())


def compare_tasks(a: TaskScore, b: TaskScore, *, samples: int, seed: int) -> Difference:
    """Compute by how much `a` scores more than `b`, with the interval of a paired bootstrap.

    The questions of all tasks of a group are resampled together, and every task has the same
    weight. A metric without a value per question has no interval.

    Raises:
        UserError: The models answered different questions.
    """
    values: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    for ours, theirs in zip(a.list_first_metrics(), b.list_first_metrics(), strict=True):
        if ours.questions != theirs.questions or ours.weights != theirs.weights:
            raise UserError(
                f"{a.name} and {b.name} answered different questions of {ours.subtask}; delete "
                "both result files and run `rayfuse evaluate`"
            )
        own = np.array(ours.weights, dtype=np.float64)
        share = own.sum() if len(own) else 1.0
        values.append((np.array(ours.values) - np.array(theirs.values)) / share)
        weights.append(own / share)
    all_values, all_weights = np.concatenate(values), np.concatenate(weights)
    if not all(len(task_values) for task_values in values):
        number = len(all_values)
        return Difference(a.value - b.value, -math.inf, math.inf, number, a.higher_is_better)
    found = bootstrap(all_values, all_weights, samples=samples, seed=seed)
    return replace(found, higher_is_better=a.higher_is_better)
