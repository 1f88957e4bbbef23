"""The tables of scores (models by text, or by task), as Markdown, HTML and rich text."""

from dataclasses import dataclass

from rich.text import Text

from rayfuse.config.text import escape_html, escape_markdown
from rayfuse.evaluate.scores import Evaluation, bits_per_byte
from rayfuse.evaluate.task_scores import TaskScore
from rayfuse.report.gather import Findings
from rayfuse.report.verdict import ROLE_TITLES, name_domain
from rayfuse.run.failed_sources import describe_failed

TASK_NOTE = "Tasks, through lm-eval; arrows show which direction is better."

UP, DOWN, DASH = "\u2191", "\u2193", "\u2013"
"""Higher is better, lower is better, no score."""


@dataclass(frozen=True)
class ScoreTable:
    """Scores as text, with four decimals."""

    header: list[str]
    """`model`, `what it is`, then a column for each group of documents or task."""
    rows: list[list[str]]
    best: list[int]
    """The row with the best score of each score column."""

    def is_best(self, row: int, column: int) -> bool:
        """Check whether a cell is the best score of its column."""
        return column >= 2 and self.best[column - 2] == row


def build_table(evaluations: dict[str, Evaluation]) -> ScoreTable:
    """Build the table of bits per byte.

    Args:
        evaluations: By name, all on the same documents.
    """
    scores = {name: bits_per_byte(model.documents) for name, model in evaluations.items()}
    groups = list(next(iter(scores.values())))
    if len(groups) == 2:  # a single domain: its column would equal the one of all text
        groups = groups[:1]
    rows = [
        [name, ROLE_TITLES[model.role], *(f"{scores[name][group]:.4f}" for group in groups)]
        for name, model in evaluations.items()
    ]
    names = list(scores)
    best = [min(range(len(names)), key=lambda i: scores[names[i]][group]) for group in groups]
    return ScoreTable(["model", "what it is", *map(name_domain, groups)], rows, best)


def build_task_table(
    evaluations: dict[str, Evaluation], scores: dict[str, dict[str, TaskScore]]
) -> ScoreTable:
    """Build the table of tasks: a row per model, a column per task, its metric in the header.

    Args:
        evaluations: The models by name.
        scores: By task, then by model; a model without a score has a dash.
    """
    rows = [
        [
            name,
            ROLE_TITLES[model.role],
            *(_format_score(by_model.get(name)) for by_model in scores.values()),
        ]
        for name, model in evaluations.items()
    ]
    names = list(evaluations)
    best = [
        (max if _first(by_model).higher_is_better else min)(
            (i for i, name in enumerate(names) if name in by_model),
            key=lambda i: by_model[names[i]].value,
        )
        for by_model in scores.values()
    ]
    heads = [f"{task}, {_format_metric(_first(by_model))}" for task, by_model in scores.items()]
    return ScoreTable(["model", "what it is", *heads], rows, best)


def _first(by_model: dict[str, TaskScore]) -> TaskScore:
    return next(iter(by_model.values()))


def _format_metric(score: TaskScore) -> str:
    """Name a task's metric, with an arrow in the better direction."""
    metrics = sorted({part.metric for part in score.list_first_metrics()})
    return f"{', '.join(metrics)} {UP if score.higher_is_better else DOWN}"


def _format_score(score: TaskScore | None) -> str:
    return f"{score.value:.4f}" if score else DASH


def render_markdown(table: ScoreTable) -> str:
    """Render a table as Markdown, with the best score of each column in bold."""
    lines = [[escape_markdown(cell) for cell in table.header]]
    lines.append(["---", "---", *("---:" for _ in table.best)])
    for i, row in enumerate(table.rows):
        cells = [escape_markdown(cell) for cell in row]
        lines.append(
            [f"**{cell}**" if table.is_best(i, j) else cell for j, cell in enumerate(cells)]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def render_tables(findings: Findings) -> str:
    """Render the tables of held-out text and of tasks, if there are any, as Markdown."""
    text = render_markdown(build_table(findings.evaluations))
    text += "".join(f"\n{escape_markdown(line)}\n" for line in describe_failed(findings.failed))
    if not findings.task_scores:
        return text
    tasks = build_task_table(findings.evaluations, findings.task_scores)
    return f"{text}\n{TASK_NOTE}\n\n{render_markdown(tasks)}"


def render_html(table: ScoreTable) -> str:
    """Render a table as HTML, with the best score of each column in the class `best`."""
    head = "".join(f'<th scope="col">{escape_html(cell)}</th>' for cell in table.header)
    body = "".join(_render_html_row(table, i) for i in range(len(table.rows)))
    return (
        f'<table class="scores"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>\n'
    )


def _render_html_row(table: ScoreTable, row: int) -> str:
    name, role, *scores = (escape_html(cell) for cell in table.rows[row])
    cells = [f'<th scope="row">{name}</th><td class="role">{role}</td>']
    for column, score in enumerate(scores, 2):
        is_best = table.is_best(row, column)
        cells.append(f'<td class="best"><b>{score}</b></td>' if is_best else f"<td>{score}</td>")
    return f'<tr class="{"fused" if name == "fused" else "other"}">{"".join(cells)}</tr>\n'


def render_rich(table: ScoreTable) -> list[list[Text]]:
    """Prepare header and rows of a rich table, with the best scores in bold."""
    rows = [
        [Text(cell, "bold" if table.is_best(i, j) else "") for j, cell in enumerate(row)]
        for i, row in enumerate(table.rows)
    ]
    return [[Text(cell) for cell in table.header], *rows]
