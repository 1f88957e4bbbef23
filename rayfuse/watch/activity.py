"""The parts of the page about workers, rejects and cost."""

from dataclasses import dataclass

from rayfuse.capture.workers import REPORT_SECONDS, WorkerState
from rayfuse.config.text import escape_html, show_on_one_line
from rayfuse.report.page import format_seconds
from rayfuse.watch.counts import WorkerSums
from rayfuse.watch.progress import render_table
from rayfuse.watch.snapshot import Snapshot
from rayfuse.watch.trainings import TrainingState

MAX_WORKERS = 40
"""Workers in the table: those at work, then those that have done most."""

MAX_REASONS = 40
"""Reasons of rejects in the table: the most frequent ones."""

SILENT_SECONDS = 6 * REPORT_SECONDS
"""A job that has not reported for so long has probably ended."""


@dataclass(frozen=True)
class WorkerRow:
    """A worker in the table."""

    part: str
    """The source or the training it works for."""
    place: str
    gpus: str
    doing: str
    sums: WorkerSums
    is_live: bool


def render_workers(snapshot: Snapshot) -> str:
    """Render which worker holds which GPU, and what it works on."""
    rows = [row for source in snapshot.sources for row in list_workers(snapshot, source)]
    rows += [row for run in snapshot.trainings for row in _list_train_workers(run)]
    rows.sort(key=lambda row: (not row.is_live, -row.sums.shards))
    cells = [
        [
            escape_html(show_on_one_line(row.part)),
            escape_html(show_on_one_line(row.place)),
            escape_html(row.gpus),
            escape_html(row.doing),
            f"{row.sums.shards:,}" if row.sums.shards else "",
            *_describe_speed(row.sums),
        ]
        for row in rows[:MAX_WORKERS]
    ]
    if not cells:
        return '<p class="note">No worker has reported yet.</p>\n'
    header = ["for", "node and process", "GPU", "state", "shards", "tokens/s when busy", "busy"]
    table = render_table("workers", header, cells)
    hidden = len(rows) - len(cells)
    return table + (f'<p class="note">And {hidden:,} more.</p>\n' if hidden else "")


def list_workers(snapshot: Snapshot, source: str) -> list[WorkerRow]:
    """List the workers of a source: those of running jobs, and those that have done shards."""
    data = next(data for data in snapshot.data_sets if data.label == f"capture {source}")
    left = {_split_name(name): sums for name, sums in data.workers.items()}
    rows: list[WorkerRow] = []
    for report in snapshot.reports.get(source, []):
        age = snapshot.read_at - report.time
        for worker in report.workers:
            sums = left.pop((worker.host, str(worker.pid)), WorkerSums())
            doing = _describe_work(worker, report.time)
            if age > SILENT_SECONDS:
                doing = f"silent for {format_seconds(age)}"
            place = f"{worker.host}, process {worker.pid}"
            gpus = ", ".join(worker.gpus) or "none"
            rows.append(WorkerRow(source, place, gpus, doing, sums, age <= SILENT_SECONDS))
    for (host, pid), sums in left.items():
        place = f"{host}, process {pid}" if pid else host
        rows.append(WorkerRow(source, place, "", "ended", sums, False))
    return rows


def _split_name(worker: str) -> tuple[str, str]:
    """Split a worker's name in commit records, HOST-PID-SUFFIX, into host and process."""
    parts = worker.rsplit("-", 2)
    return (parts[0], parts[1]) if len(parts) == 3 else (worker, "")


def _describe_work(worker: WorkerState, now: float) -> str:
    if not worker.is_loaded:
        return f"loading its model for {format_seconds(max(now - worker.started, 0))}"
    if not worker.shards:
        return "idle"
    began = min(worker.shards.values())
    shards = ", ".join(sorted(worker.shards, key=int))
    word = "shard" if len(worker.shards) == 1 else "shards"
    return f"{word} {shards}, for {format_seconds(max(now - began, 0))}"


def _list_train_workers(run: TrainingState) -> list[WorkerRow]:
    is_live = run.holder is not None and not run.is_holder_silent and not run.is_complete
    doing = f"step {run.steps:,}" if is_live else "ended"
    return [
        WorkerRow(
            f"training {run.name}",
            f"{worker.host}, process {worker.pid}, rank {worker.rank}",
            ", ".join(worker.gpus) or "none",
            doing,
            WorkerSums(),
            is_live,
        )
        for worker in run.workers
    ]


def _describe_speed(sums: WorkerSums) -> tuple[str, str]:
    seconds = sums.busy_seconds + sums.idle_seconds
    if not sums.busy_seconds:
        return "", ""
    return f"{sums.tokens / sums.busy_seconds:,.0f}", f"{sums.busy_seconds / seconds:.0%}"


def render_rejects(snapshot: Snapshot) -> str:
    """Render how many rows or documents were rejected, by data set and reason."""
    rejects = [
        (count, data.label, reason)
        for data in snapshot.data_sets
        for reason, count in data.rejects.items()
    ]
    if not rejects:
        return '<p class="note">None.</p>\n'
    rows = [
        [
            escape_html(show_on_one_line(label)),
            f"{count:,}",
            f'<span class="reason">{escape_html(show_on_one_line(reason))}</span>',
        ]
        for count, label, reason in sorted(rejects, reverse=True)[:MAX_REASONS]
    ]
    hidden = len(rejects) - len(rows)
    table = render_table("rejects", ["data set", "number", "reason"], rows)
    return table + (f'<p class="note">And {hidden:,} other reasons.</p>\n' if hidden else "")


def render_cost(snapshot: Snapshot) -> str:
    """Render the time of workers, and its price where the recipe has one."""
    has_price = any(cost.dollars is not None for cost in snapshot.costs)
    rows = [
        [
            escape_html(f"capture {cost.source}"),
            format_seconds(cost.worker_seconds),
            _show_left(cost.left_seconds),
            *[_show_dollars(cost.dollars), _show_dollars(cost.dollars_left)] * has_price,
        ]
        for cost in snapshot.costs
    ]
    for run in snapshot.trainings:
        workers, left = run.last("num_workers") or 1, run.seconds_left
        left = None if left is None else left * workers
        time = format_seconds(run.worker_seconds)
        rows.append([f"training {run.name}", time, _show_left(left), *["", ""] * has_price])
    header = ["part", "workers' time", "time left", *["dollars", "dollars left"] * has_price]
    price = "at" if has_price else "set"
    return (
        render_table("cost", header, rows)
        + '<p class="note">Busy and idle time of all workers together, of committed shards and '
        "stored steps; without the time to load models. Dollars of a capture: "
        f"{price} <code>sources.dollars_per_hour</code>.</p>\n"
    )


def _show_left(seconds: float | None) -> str:
    return format_seconds(seconds) if seconds else ""


def _show_dollars(dollars: float | None) -> str:
    return "" if dollars is None else f"${dollars:,.2f}"
