"""What the report tells, read from the store into one frozen value."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from rayfuse.config.base import UserError
from rayfuse.config.recipe import Recipe
from rayfuse.evaluate.bootstrap import Difference
from rayfuse.evaluate.scores import Evaluation, compare_evaluations, parse_evaluation
from rayfuse.evaluate.task_scores import TaskScore, compare_tasks, parse_task_score
from rayfuse.fuse.source_filter import is_noise
from rayfuse.report.timeline import ShardSpan, read_spells
from rayfuse.run.layout import Layout, Merge, TrainRun
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.manifest import Commit, ShardError
from rayfuse.storage.store import Store

MAX_SHARDS = 64
"""Shards that the sources' wins are counted on: 64 million tokens by default."""

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
class SourceWins:
    """How many rows each source has the lowest cross-entropy on, in nats per byte."""

    counts: dict[str, dict[str, int]]
    """By domain, then by source; every domain has every source."""
    unscored_rows: int
    """Rows that no source has scored."""
    shards_read: int
    num_shards: int


@dataclass(frozen=True)
class SourceSignal:
    """How much one source has to say in the target's tokens."""

    positions: int
    """Target positions that a token follows."""
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
    """What one data set holds, and what it had to leave out."""

    stage: str
    rows: int
    tokens: int
    rejects: int


@dataclass(frozen=True)
class Findings:
    """All that the report tells."""

    evaluations: dict[str, Evaluation]
    """By name: sources, ensemble, merged weights, target, CLM, fused."""
    differences: dict[str, dict[str, Difference]]
    """What fused pays more than another model: by that model's name, then by group."""
    curves: dict[str, Curve]
    """By run; runs without metrics are not there."""
    wins: SourceWins
    signals: dict[str, SourceSignal]
    """By source."""
    spells: dict[str, list[ShardSpan]]
    """By source: when its workers had which shard."""
    counts: list[StageCount]
    task_scores: dict[str, dict[str, TaskScore]]
    """By task, then by model."""
    task_differences: dict[str, dict[str, Difference]]
    """By task, then by the model that fused is compared with."""
    merge: Merge
    """Whose weights are averaged as a baseline, and why others are not."""


def gather_findings(recipe: Recipe, layout: Layout) -> Findings:
    """Return what the report tells of a run that is done.

    Raises:
        ValueError: A model is not evaluated, or not on the same documents as another.
        ShardError: A shard is missing or corrupt.
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
    curves = {run.name: read_curve(layout.store, run) for run in layout.runs}
    return Findings(
        evaluations=evaluations,
        differences=differences,
        curves={name: curve for name, curve in curves.items() if curve is not None},
        wins=count_wins(layout.corpus, layout.aligned),
        signals={name: measure_signal(data) for name, data in layout.aligned.items()},
        spells={name: read_spells(data) for name, data in layout.captured.items()},
        counts=count_stages(layout),
        task_scores=tasks,
        task_differences={task: compare_to_fused(each, recipe) for task, each in tasks.items()},
        merge=layout.evaluation.merge,
    )


def read_evaluations(layout: Layout) -> dict[str, Evaluation]:
    """Return every model's evaluation, sources first and the fused model last.

    Raises:
        ValueError: One is missing.
    """
    found: dict[str, Evaluation] = {}
    for name, file in layout.evaluation.scores.items():
        try:
            found[name] = parse_evaluation(layout.store.read(file))
        except FileNotFoundError as error:
            raise UserError(
                f"the model {name} is not evaluated; run `rayfuse evaluate` first"
            ) from error
    ordered = sorted(found, key=lambda name: ROLE_ORDER.index(found[name].role))
    return {name: found[name] for name in ordered}


def read_task_scores(layout: Layout, names: list[str]) -> dict[str, dict[str, TaskScore]]:
    """Return the scores by task and model, models in order; those not asked are not there.

    Raises:
        ValueError: A score is missing.
    """
    found: dict[str, dict[str, TaskScore]] = {}
    for name in names:
        for task, file in layout.evaluation.task_scores.get(name, {}).items():
            try:
                score = parse_task_score(layout.store.read(file))
            except FileNotFoundError as error:
                raise UserError(
                    f"the model {name} has no score at {task}; run `rayfuse evaluate` first"
                ) from error
            if score.subtasks:
                found.setdefault(task, {})[name] = score
    return found


def compare_to_fused(scores: dict[str, TaskScore], recipe: Recipe) -> dict[str, Difference]:
    """Return by how much fused scores more than each other model at one task."""
    return {
        name: compare_tasks(
            scores["fused"], other, samples=recipe.evaluate.bootstrap_samples, seed=recipe.seed
        )
        for name, other in scores.items()
        if name != "fused"
    }


def read_curve(store: Store, run: TrainRun) -> Curve | None:
    """Return a run's metrics by step, or nothing where it has none.

    A run that went on from a checkpoint may have a step twice: the later line counts.
    """
    try:
        lines = store.read(f"{run.folder}/metrics.jsonl").splitlines()
    except FileNotFoundError:
        return None
    steps: dict[int, dict[str, Any]] = {}
    for line in lines:
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


def count_wins(corpus: DataSet, aligned: dict[str, DataSet]) -> SourceWins:
    """Return how often each source wins, on the first `MAX_SHARDS` shards.

    Raises:
        ValueError: A shard holds other rows than the corpus.
        ShardError: A shard is missing or corrupt.
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
        winners = choose_winners(nats, rows["num_bytes"].to_numpy())
        unscored += int((winners < 0).sum())
        for domain, winner in zip(rows["domain"].to_pylist(), winners, strict=True):
            row = counts.setdefault(domain, dict.fromkeys(sources, 0))
            if winner >= 0:
                row[sources[winner]] += 1
    ordered = {domain: counts[domain] for domain in sorted(counts)}
    return SourceWins(ordered, unscored, len(shards), len(commits))


def choose_winners(
    nats: Float[np.ndarray, "num_sources rows"], num_bytes: Int[np.ndarray, " rows"]
) -> Int[np.ndarray, " rows"]:
    """Return the source with the lowest nats per byte of each row, ties to the first; -1 for none.

    Args:
        nats: Not finite where a source has not scored the row.
        num_bytes: Of each row's text.
    """
    costs = np.where(np.isfinite(nats), nats / np.maximum(num_bytes, 1), np.inf)
    return np.where(np.isfinite(costs).any(axis=0), costs.argmin(axis=0), -1)


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
    """Return how much one source has to say, from its commit records alone."""
    commits = aligned.commits().values()
    stats = [commit.stats for commit in commits]
    with_signal = sum(each["with_signal"] for each in stats)
    tail = sum(each["tail_mass"] for each in stats)
    captured = [each["captured_tail_mass"] for each in stats if "captured_tail_mass" in each]
    is_recorded = bool(captured) and len(captured) == len(stats)
    return SourceSignal(
        positions=int(sum(each["positions"] for each in stats)),
        with_signal=int(with_signal),
        tail_mass=float(tail / max(with_signal, 1)),
        captured_tail_mass=float(sum(captured) / max(with_signal, 1)) if is_recorded else None,
        is_noise=is_noise([*commits]),
    )


def count_stages(layout: Layout) -> list[StageCount]:
    """Return what each data set of the run holds, and how many rows it left out."""
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
