"""Everything that the page shows, read from the store at one moment."""

import math
import time
from dataclasses import dataclass, replace
from typing import Any

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.capture.workers import WorkerReport, read_reports
from rayfuse.config.recipe import Recipe
from rayfuse.pipeline import STAGES, is_stage_done
from rayfuse.run.failed_sources import (
    describe_failed,
    drop_sources,
    plan_run,
    read_failures,
)
from rayfuse.run.layout import Layout, TrainRun, plan_layout
from rayfuse.run.made_models import is_made, read_inputs
from rayfuse.runtime.progress import PaceEstimator, ProgressEvent
from rayfuse.status import list_data_sets
from rayfuse.storage.seal import ShardError
from rayfuse.train.order import count_steps
from rayfuse.watch.counts import DataSetCounter, DataSetState
from rayfuse.watch.trainings import TrainingReader, TrainingState

READ_SECONDS = 0.8
"""Time for reading records in one refresh: 10,000 single ones take a few refreshes."""

RESULT_SECONDS = 30.0
"""Between two checks of the stages after train, which read all results."""


@dataclass(frozen=True)
class SourceCost:
    """What the capture of one source has taken so far, by all jobs."""

    source: str
    worker_seconds: float
    """Busy and idle time of the workers, of committed shards."""
    left_seconds: float | None
    """Worker time of the shards left, at the same speed; None if it is unknown."""
    dollars: float | None
    """None without `sources.dollars_per_hour`; likewise for those left."""
    dollars_left: float | None


@dataclass(frozen=True)
class StageState:
    """The progress of one stage."""

    stage: str
    is_complete: bool
    done: int
    total: int | None
    unit: str
    """Of `done` and `total`, in the plural."""
    seconds_left: float | None
    """None if it is unknown."""


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment."""

    read_at: float
    """Unix time in seconds, by this computer's clock."""
    root: str
    """The storage."""
    target: str
    sources: tuple[str, ...]
    stages: list[StageState]
    data_sets: list[DataSetState]
    trainings: list[TrainingState]
    reports: dict[str, list[WorkerReport]]
    """Of capture jobs, by source."""
    costs: list[SourceCost]
    unread: int
    """Records that are not read yet."""
    faults: list[str]
    """Files that cannot be read, and other errors."""

    @property
    def written_at(self) -> float | None:
        """When the run last reported a number: Unix time in seconds, by the clocks of its nodes."""
        logs = [data.log[-1]["time"] for data in self.data_sets if data.log]
        reports = [report.time for found in self.reports.values() for report in found]
        shards = [w.last_time for data in self.data_sets for w in data.workers.values()]
        return max([*logs, *reports, *(at for at in shards if at)], default=None)


class RunReader:
    """Reads a run again and again; what was read before is kept."""

    def __init__(self, recipe: Recipe) -> None:
        """Lay out the run; reads model files and lists documents.

        Raises:
            UserError: The recipe cannot be used.
        """
        self.given = recipe, plan_layout(recipe, ALIGN_FACTS)
        """The recipe with its layout, and all sources in both."""
        self._lay_out(read_failures(*self.given))
        self.pace = PaceEstimator()
        self.results: dict[str, bool] = {}
        self.result_faults: list[str] = []
        """Of the last check of the stages after train, which found `results`."""
        self.results_at = -math.inf

    def _lay_out(self, failed: dict[str, str]) -> None:
        """Lay out the run without the sources that have failed; what was read is read again."""
        recipe, layout = self.given
        self.layout = plan_run(recipe, ALIGN_FACTS) if failed else layout
        self.recipe = drop_sources(recipe, self.layout.failed)
        self.counters = [DataSetCounter(part) for part in list_data_sets(self.layout)]
        self.trainings = [TrainingReader(self.layout.store, run) for run in self.layout.runs]

    def read(self) -> Snapshot:
        """Read what is new in the store.

        Raises:
            UserError: It has another schema version.
            OSError: It cannot be read.
        """
        deadline = time.monotonic() + READ_SECONDS
        failed = read_failures(*self.given)
        if failed != self.layout.failed:
            self._lay_out(failed)
        faults = describe_failed(failed)
        num_shards = self._count_shards(faults)
        data_sets = [
            counter.refresh(num_shards if counter.data.inputs else None, deadline)
            for counter in self.counters
        ]
        self._check_results()
        num_steps = self._count_steps(data_sets[0])
        trainings = [
            reader.refresh(num_steps, is_complete=self._is_trained(reader.run, faults))
            for reader in self.trainings
        ]
        faults += self.result_faults
        faults += [fault for part in (*data_sets, *trainings) for fault in part.faults]
        return Snapshot(
            read_at=time.time(),
            root=self.layout.store.root,
            target=self.recipe.target.model,
            sources=tuple(source.name for source in self.recipe.sources),
            stages=self._describe_stages(data_sets, trainings),
            data_sets=data_sets,
            trainings=trainings,
            reports=self._read_reports(faults),
            costs=self._sum_costs(data_sets),
            unread=sum(data.unread for data in data_sets),
            faults=faults,
        )

    def _count_shards(self, faults: list[str]) -> int | None:
        try:
            manifest = self.layout.corpus.read_manifest()
        except ShardError as error:
            faults.append(str(error))
            return None
        return manifest.num_shards if manifest else None

    def _count_steps(self, corpus: DataSetState) -> int | None:
        train = self.recipe.train
        if not corpus.is_complete:
            return None
        return count_steps(corpus.rows, train.rows_per_step, train.epochs)

    def _check_results(self) -> None:
        """Check whether the stages after train are complete, unless that was done just before."""
        if time.monotonic() - self.results_at < RESULT_SECONDS:
            return
        self.result_faults = []
        for stage in STAGES[4:]:
            self.results[stage] = self._check(stage, self.layout, self.result_faults)
        self.results_at = time.monotonic()

    def _check(self, stage: str, layout: Layout, faults: list[str]) -> bool:
        try:
            return is_stage_done(stage, layout)
        except ShardError as error:
            faults.append(str(error))
            return False

    def _is_trained(self, run: TrainRun, faults: list[str]) -> bool:
        try:
            return is_made(self.layout.store, run.folder, read_inputs(self.layout, run))
        except ShardError as error:
            faults.append(str(error))
            return False

    def _read_reports(self, faults: list[str]) -> dict[str, list[WorkerReport]]:
        found: dict[str, list[WorkerReport]] = {}
        for source, data in self.layout.captured.items():
            try:
                found[source] = read_reports(data)
            except (ShardError, KeyError, TypeError) as error:
                faults.append(str(error))
        return found

    def _describe_stages(
        self, data_sets: list[DataSetState], trainings: list[TrainingState]
    ) -> list[StageState]:
        stages = [
            self._describe_shards(stage, [data for data in data_sets if data.stage == stage])
            for stage in STAGES[:3]
        ]
        left = [run.seconds_left for run in trainings if run.seconds_left is not None]
        num_steps = trainings[0].num_steps
        stages.append(
            StageState(
                "train",
                all(run.is_complete for run in trainings),
                sum(run.steps for run in trainings),
                None if num_steps is None else num_steps * len(trainings),
                "steps",
                max(left) if left else None,
            )
        )
        files = self.layout.evaluation.list_files()
        there = self.layout.store.sizes("evaluate")
        scored = sum(file.removeprefix("evaluate/") in there for file in files)
        stages.append(
            StageState("evaluate", self.results["evaluate"], scored, len(files), "results", None)
        )
        report = self.results["report"]
        return [*stages, StageState("report", report, int(report), 1, "pages", None)]

    def _describe_shards(self, stage: str, data_sets: list[DataSetState]) -> StageState:
        is_complete = all(data.is_complete for data in data_sets)
        totals = [data.num_shards for data in data_sets]
        left = [seconds for data in data_sets if (seconds := self._estimate_left(data)) is not None]
        return StageState(
            stage,
            is_complete,
            sum(data.shards for data in data_sets),
            None if None in totals else sum(total for total in totals if total is not None),
            "shards",
            None if is_complete or not left else max(left),
        )

    def _estimate_left(self, data: DataSetState) -> float | None:
        """Estimate the time left: by the capture's own log, else by the pace that is observed."""
        if data.is_complete or data.num_shards is None:
            return None
        if data.log and data.log[-1]["seconds_left"] is not None:
            passed = max(time.time() - data.log[-1]["time"], 0)
            return max(data.log[-1]["seconds_left"] - passed, 0)
        event = ProgressEvent("align", data.label, data.shards, data.num_shards, "shards")
        seconds = self.pace.estimate_seconds_left(event)
        return seconds if math.isfinite(seconds) else None

    def _sum_costs(self, data_sets: list[DataSetState]) -> list[SourceCost]:
        states = {data.label: data for data in data_sets}
        return [
            sum_cost(source.name, states[f"capture {source.name}"], source.dollars_per_hour)
            for source in self.recipe.sources
        ]


def sum_cost(source: str, data: DataSetState, dollars_per_hour: float | None) -> SourceCost:
    """Sum the time of a source's workers, and its price.

    Args:
        source: The source's name.
        data: Its captured data set.
        dollars_per_hour: The price of one worker, where the recipe has it.
    """
    seconds = sum((sums.busy_seconds + sums.idle_seconds for sums in data.workers.values()), 0.0)
    counted = sum(sums.shards for sums in data.workers.values())
    left = None
    if counted and data.num_shards is not None:
        left = seconds / counted * (data.num_shards - data.shards)
    cost = SourceCost(source, seconds, left, None, None)
    if dollars_per_hour is None:
        return cost
    price = dollars_per_hour / 3600
    return replace(cost, dollars=seconds * price, dollars_left=left and left * price)


def to_values(snapshot: Snapshot) -> dict[str, Any]:
    """Convert a snapshot to JSON values; data sets have the keys of `rayfuse status --json`."""
    return {
        "read_at": snapshot.read_at,
        "stages": {stage.stage: stage.is_complete for stage in snapshot.stages},
        "data_sets": {
            data.label: {
                "is_complete": data.is_complete,
                "shards": data.shards,
                "num_shards": data.num_shards,
                "rows": data.rows,
                "tokens": data.tokens,
                "rejects": data.rejects,
            }
            for data in snapshot.data_sets
        },
        "training": {
            run.name: {
                "is_complete": run.is_complete,
                "steps": run.steps,
                "num_steps": run.num_steps,
                "tokens": run.tokens,
                "seconds_left": run.seconds_left,
            }
            for run in snapshot.trainings
        },
        "unread_records": snapshot.unread,
        "faults": snapshot.faults,
    }
