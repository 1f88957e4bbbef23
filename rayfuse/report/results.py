"""Print a run's scores and verdict on a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from rayfuse.evaluate.scores import bits_per_byte
from rayfuse.report.gather import read_evaluations, read_task_scores
from rayfuse.report.stage import FINDINGS_FILE, PAGE_FILE, is_report_current
from rayfuse.report.tables import (
    TASK_NOTE,
    ScoreTable,
    build_table,
    build_task_table,
    render_rich,
)
from rayfuse.run.failed_sources import describe_failed
from rayfuse.run.layout import Layout
from rayfuse.storage.files import read_record


def print_scores(layout: Layout, console: Console) -> dict[str, Any]:
    """Print the table of scores and, if the report is current, its verdict; return both."""
    evaluations = read_evaluations(layout)
    title = "bits per byte on held-out text (lower is better)"
    _print_table(build_table(evaluations), title, console)
    tasks = read_task_scores(layout, list(evaluations))
    if tasks:
        _print_table(build_task_table(evaluations, tasks), TASK_NOTE, console)
    values: dict[str, Any] = {
        "models": {
            name: {
                "role": evaluation.role,
                "bits_per_byte": bits_per_byte(evaluation.documents),
            }
            for name, evaluation in evaluations.items()
        },
        "tasks": {
            task: {name: score.value for name, score in scores.items()}
            for task, scores in tasks.items()
        },
    }
    if not is_report_current(layout):
        for sentence in describe_failed(layout.failed):
            console.print(sentence, highlight=False)
    else:
        record = read_record(layout.store, FINDINGS_FILE)
        assert record is not None, "the report is current"
        verdict = record["verdict"]
        console.print("\n".join([verdict["headline"], *verdict["sentences"]]), highlight=False)
        values["report"] = f"{layout.store.root}/{PAGE_FILE}"
        console.print(f"report: {values['report']}", highlight=False)
    return values


def _print_table(scores: ScoreTable, title: str, console: Console) -> None:
    header, *rows = render_rich(scores)
    table = Table(title=title)
    for head in header:
        table.add_column(head)
    for row in rows:
        table.add_row(*row)
    console.print(table)
