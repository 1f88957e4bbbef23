"""The results of a run, read from the store into one frozen value."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from rayfuse.config.base import UserError, first_line
from rayfuse.config.recipe import Recipe
from rayfuse.evaluate.bootstrap import Difference
from rayfuse.evaluate.results import read_evaluation
from rayfuse.evaluate.scores import (
    OTHER,
    Evaluation,
    choose_domains,
    compare_evaluations,
)
from rayfuse.evaluate.task_scores import TaskScore, compare_tasks, parse_task_score
from rayfuse.fuse.source_filter import is_noise
from rayfuse.report.overlap import Overlap, find_overlaps
from rayfuse.report.spans import ShardSpan, read_spans
from rayfuse.run.layout import Layout, Merge, TrainRun
from rayfuse.run.made_models import DONE_FILE
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.files import read_listed
from rayfuse.storage.manifest import Commit
from rayfuse.storage.seal import ShardError
from rayfuse.storage.store import Store

MAX_SHARDS = 64
"""Shards on which the best source of each row is counted: 64 million tokens by default."""

ROLE_ORDER = ("source", "ensemble", "merged", "target", "clm", "fused")


@dataclass(frozen=True)
class Curve:
    """One training, step by step; at least one step."""

    steps: Int[np.ndarray, " steps"]
    tokens: Int[np.ndarray, " steps"]
    """Target tokens learned so far."""
    clm_loss: Float[np.ndarray, " steps"]
    """Nats per target token."""
    fusion_loss: Float[np.ndarray, " steps"]
    """Nats per position with a signal; NaN where a step has none."""
    seconds: Float[np.ndarray, " steps"]
    """Of each step."""


@dataclass(frozen=True)
class SourceSelection:
    """In how many rows each source has the lowest NLL per byte."""

    counts: dict[str, dict[str, int]]
    """By domain, then by source; every domain has every source."""
    unscored_rows: int
    """Rows without a score of any source."""
    shards_read: int
    num_shards: int


@dataclass(frozen=True)
class SourceSignal:
    """How much of one source's distributions is left in the target's tokens."""

    positions: int
    """Target positions with a next token."""
    with_signal: int
    tail_mass: float
    """Mean probability outside the top k, over the positions with a signal."""
    captured_tail_mass: float | None
    """The same in the source's own tokens, where it was recorded."""
    is_noise: bool = False
    """It predicts no row better than chance."""

    @property
    def share(self) -> float:
        """Positions with a signal among all."""
        return self.with_signal / self.positions if self.positions else 0.0


@dataclass(frozen=True)
class StageCount:
    """The size of one data set, and its rejected rows."""

    stage: str
    rows: int
    tokens: int
    rejects: int


@dataclass(frozen=True)
class Findings:
    """Everything that the report shows."""

    evaluations: dict[str, Evaluation]
    """By name: sources, ensemble, merged weights, target, CLM, fused."""
    differences: dict[str, dict[str, Difference]]
    """Bits per byte of fused minus those of another model: by its name, then by group."""
    curves: dict[str, Curve]
    """By run; runs without metrics are missing."""
    selection: SourceSelection
    signals: dict[str, SourceSignal]
    """By source."""
    spans: dict[str, list[ShardSpan]]
    """By source: which worker captured which shard when."""
    counts: list[StageCount]
    task_scores: dict[str, dict[str, TaskScore]]
    """By task, then by model."""
    task_differences: dict[str, dict[str, Difference]]
    """By task, then by the model that fused is compared with."""
    merge: Merge
    """The sources of the merged weights, and why others are excluded."""
    overlap: Overlap
    """Held-out documents whose text is in the corpus."""
    task_overlap: dict[str, Overlap]
    """By task: questions whose text is in the corpus."""
    task_overlap_fault: str | None
    """Why no questions were compared; None if they were, or there are none."""
    failed: Mapping[str, str] = field(default_factory=dict[str, str])
    """Sources of the recipe that the run does without, each with the reason."""
    has_selection: bool = False
    """Half of the held-out documents have chosen the weights, and are not in the evaluations."""


def gather_findings(recipe: Recipe, layout: Layout) -> Findings:
    """Gather the results of a run.

    Raises:
        UserError: A model is not evaluated.
        UserError: Models are evaluated on different documents.
        ShardError: A shard is missing or corrupt, or holds other rows than the corpus.
    """
    evaluations = read_evaluations(layout)
    fused = evaluations["fused"]
    differences = {
        name: compare_evaluations(
            fused, other, samples=recipe.evaluate.bootstrap_samples, seed=recipe.seed
        )
        for name, other in evaluations.items()
        if name != "fused"
    }
    tasks = read_task_scores(layout, list(evaluations))
    questions, fault = _read_questions(recipe) if tasks else ({}, None)
    overlap, task_overlap = find_overlaps(layout.corpus, layout.held_out, questions)
    curves = {run.name: read_curve(layout.store, run) for run in layout.runs}
    return Findings(
        evaluations=evaluations,
        differences=differences,
        curves={name: curve for name, curve in curves.items() if curve is not None},
        selection=count_selected_rows(layout.corpus, layout.aligned),
        signals={name: measure_signal(data) for name, data in layout.aligned.items()},
        spans={name: read_spans(data) for name, data in layout.captured.items()},
        counts=count_stages(layout),
        task_scores=tasks,
        task_differences={task: compare_to_fused(scores, recipe) for task, scores in tasks.items()},
        merge=layout.evaluation.merge,
        overlap=overlap,
        task_overlap=task_overlap,
        task_overlap_fault=fault,
        failed=layout.failed,
        has_selection=layout.has_selection,
    )


def _read_questions(recipe: Recipe) -> tuple[dict[str, list[str]], str | None]:
    """Read the questions of the recipe's tasks, by task, or why that is not possible here.

    A report may be written on another node than the evaluation, without lm-eval or the data.
    """
    assert recipe.evaluate.tasks is not None, "a run without tasks has no scores of tasks"
    try:
        from rayfuse.evaluate.lm_eval_tasks import read_questions  # lm-eval is optional

        return read_questions(recipe.evaluate.tasks), None
    except (ImportError, UserError) as error:
        return {}, first_line(error)


def read_evaluations(layout: Layout) -> dict[str, Evaluation]:
    """Read every model's evaluation, sources first and the fused model last.

    Raises:
        UserError: One is missing.
    """
    found: dict[str, Evaluation] = {}
    for name, file in layout.evaluation.scores.items():
        try:
            found[name] = read_evaluation(layout, file)
        except FileNotFoundError as error:
            raise UserError(
                f"the model {name} is not evaluated; run `rayfuse evaluate` first"
            ) from error
    ordered = sorted(found, key=lambda name: ROLE_ORDER.index(found[name].role))
    return {name: found[name] for name in ordered}


def read_task_scores(layout: Layout, names: list[str]) -> dict[str, dict[str, TaskScore]]:
    """Read the scores by task and model, models in order; a model without a score is missing.

    Raises:
        UserError: The layout has a score that the store has not.
    """
    found: dict[str, dict[str, TaskScore]] = {}
    for name in names:
        for task, file in layout.evaluation.task_scores.get(name, {}).items():
            try:
                score = parse_task_score(layout.store.read(file), f"{layout.store.root}/{file}")
            except FileNotFoundError as error:
                raise UserError(
                    f"the model {name} has no score at {task}; run `rayfuse evaluate` first"
                ) from error
            if score.subtasks:
                found.setdefault(task, {})[name] = score
    return found


def compare_to_fused(scores: dict[str, TaskScore], recipe: Recipe) -> dict[str, Difference]:
    """Compare the fused model with each other model at one task."""
    return {
        name: compare_tasks(
            scores["fused"], other, samples=recipe.evaluate.bootstrap_samples, seed=recipe.seed
        )
        for name, other in scores.items()
        if name != "fused"
    }


def read_curve(store: Store, run: TrainRun) -> Curve | None:
    """Read a trained run's metrics by step; None if it has none.

    A run that was resumed from a checkpoint may have a step twice: the later line counts.

    Raises:
        ShardError: They are not what was written.
    """
    try:
        content = read_listed(store, f"{run.folder}/{DONE_FILE}", "metrics.jsonl")
    except FileNotFoundError:
        return None
    steps: dict[int, dict[str, Any]] = {}
    for line in content.splitlines():
        record: dict[str, Any] = json.loads(line)
        steps[record["step"]] = record
    if not steps:
        return None
    records = [steps[step] for step in sorted(steps)]
    fusion = [record["fusion_loss"] for record in records]
    return Curve(
        steps=np.array([record["step"] for record in records], dtype=np.int64),
        tokens=np.array([record["tokens"] for record in records], dtype=np.int64),
        clm_loss=np.array([record["clm_loss"] for record in records], dtype=np.float64),
        fusion_loss=np.array([np.nan if loss is None else loss for loss in fusion], dtype=float),
        seconds=np.array([record["seconds"] for record in records], dtype=np.float64),
    )


def count_selected_rows(corpus: DataSet, aligned: dict[str, DataSet]) -> SourceSelection:
    """Count the rows in which each source has the lowest NLL, on the first `MAX_SHARDS` shards.

    Raises:
        ShardError: A shard is missing or corrupt, or holds other rows than the corpus.
    """
    commits = corpus.commits()
    shards = sorted(commits)[:MAX_SHARDS]
    sources = list(aligned)
    by_source = {name: data.commits() for name, data in aligned.items()}
    counts: dict[str, dict[str, int]] = {}
    unscored = 0
    for shard in shards:
        rows = corpus.read_shard(commits[shard], columns=["row_id", "domain", "num_bytes"])
        nats = np.stack(
            [_read_nats(aligned[name], by_source[name], shard, rows) for name in sources]
        )
        selected = select_lowest_nll(nats, rows["num_bytes"].to_numpy())
        unscored += int((selected < 0).sum())
        for domain, number in zip(rows["domain"].to_pylist(), selected, strict=True):
            row = counts.setdefault(domain, dict.fromkeys(sources, 0))
            if number >= 0:
                row[sources[number]] += 1
    return SourceSelection(_pool_small_domains(counts), unscored, len(shards), len(commits))


def _pool_small_domains(counts: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Sort the rows per source by domain; all but the largest domains are added up in `OTHER`."""
    own = choose_domains({domain: sum(row.values()) for domain, row in counts.items()})
    pooled = {domain: counts[domain] for domain in own}
    for domain in counts.keys() - set(own):
        total = pooled.setdefault(OTHER, dict.fromkeys(counts[domain], 0))
        pooled[OTHER] = {name: total[name] + rows for name, rows in counts[domain].items()}
    return pooled


def select_lowest_nll(
    nats: Float[np.ndarray, "num_sources rows"], num_bytes: Int[np.ndarray, " rows"]
) -> Int[np.ndarray, " rows"]:
    """Select the source with the lowest NLL of each row, ties to the first; -1 for none.

    Args:
        nats: NLL of each row; not finite where a source has not scored it.
        num_bytes: Bytes of each row's text.
    """
    nll_per_byte = np.where(np.isfinite(nats), nats / np.maximum(num_bytes, 1), np.inf)
    return np.where(np.isfinite(nll_per_byte).any(axis=0), nll_per_byte.argmin(axis=0), -1)


def _read_nats(
    data: DataSet, commits: dict[int, Commit], shard: int, rows: pa.Table
) -> Float[np.ndarray, " rows"]:
    commit = commits.get(shard) or data.read_commit(shard)
    table = data.read_shard(commit, columns=["row_id", "nats"])
    if not table["row_id"].equals(rows["row_id"]):
        raise ShardError(
            f"{data.folder}: shard {shard} holds other rows than the corpus; run `rayfuse verify`"
        )
    return table["nats"].to_numpy().astype(np.float64)


def measure_signal(aligned: DataSet) -> SourceSignal:
    """Measure a source's signal from its commit records, without reading any shard."""
    commits = aligned.commits().values()
    stats = [commit.stats for commit in commits]
    with_signal = sum(shard["with_signal"] for shard in stats)
    tail = sum(shard["tail_mass"] for shard in stats)
    captured = [shard["captured_tail_mass"] for shard in stats if "captured_tail_mass" in shard]
    is_recorded = bool(captured) and len(captured) == len(stats)
    return SourceSignal(
        positions=int(sum(shard["positions"] for shard in stats)),
        with_signal=int(with_signal),
        tail_mass=float(tail / max(with_signal, 1)),
        captured_tail_mass=float(sum(captured) / max(with_signal, 1)) if is_recorded else None,
        is_noise=is_noise([*commits]),
    )


def count_stages(layout: Layout) -> list[StageCount]:
    """Count the rows, tokens and rejects of every data set of the run."""
    stages = {"corpus": layout.corpus, "held-out": layout.held_out}
    stages |= {f"capture {name}": data for name, data in layout.captured.items()}
    stages |= {f"align {name}": data for name, data in layout.aligned.items()}
    return [_count_stage(stage, data) for stage, data in stages.items()]


def _count_stage(stage: str, data: DataSet) -> StageCount:
    commits = data.commits().values()
    return StageCount(
        stage=stage,
        rows=sum(commit.rows for commit in commits),
        tokens=sum(commit.tokens for commit in commits),
        rejects=sum(commit.rejects for commit in commits),
    )
