"""The table of scores: models x (all text and each domain), in every form that is shown."""

import html
import re
from dataclasses import dataclass

from rayfuse.evaluate.scores import Evaluation, bits_per_byte
from rayfuse.report.verdict import ROLE_TITLES, name_domain


@dataclass(frozen=True)
class ScoreTable:
    """Bits per byte as text, four decimals."""

    header: list[str]
    """`model`, `what it is`, then a column for each group of documents."""
    rows: list[list[str]]
    best: list[int]
    """Of each group's column, the row with the lowest score."""

    def is_best(self, row: int, column: int) -> bool:
        """Return whether a cell is the lowest score of its column."""
        return column >= 2 and self.best[column - 2] == row


def build_table(evaluations: dict[str, Evaluation]) -> ScoreTable:
    """Return the table of evaluations, in their order.

    Args:
        evaluations: By name, all on the same documents.
    """
    scores = {name: bits_per_byte(each.documents) for name, each in evaluations.items()}
    groups = list(next(iter(scores.values())))
    if len(groups) == 2:  # the one domain is all the text there is
        groups = groups[:1]
    rows = [
        [name, ROLE_TITLES[each.role], *(f"{scores[name][group]:.4f}" for group in groups)]
        for name, each in evaluations.items()
    ]
    names = list(scores)
    best = [min(range(len(names)), key=lambda i: scores[names[i]][group]) for group in groups]
    return ScoreTable(["model", "what it is", *map(name_domain, groups)], rows, best)


def render_markdown(table: ScoreTable) -> str:
    """Return the table as Markdown, the lowest score of each column in bold."""
    lines = [[escape_markdown(cell) for cell in table.header]]
    lines.append(["---", "---", *("---:" for _ in table.best)])
    for i, row in enumerate(table.rows):
        cells = [escape_markdown(cell) for cell in row]
        lines.append(
            [f"**{cell}**" if table.is_best(i, j) else cell for j, cell in enumerate(cells)]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def render_html(table: ScoreTable) -> str:
    """Return the table as HTML, the lowest score of each column marked as class `best`."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in table.header)
    body = "".join(_render_html_row(table, i) for i in range(len(table.rows)))
    return (
        f'<table class="scores"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>\n'
    )


def _render_html_row(table: ScoreTable, row: int) -> str:
    name, role, *scores = (html.escape(cell) for cell in table.rows[row])
    cells = [f'<th scope="row">{name}</th><td class="role">{role}</td>']
    for column, score in enumerate(scores, 2):
        is_best = table.is_best(row, column)
        cells.append(f'<td class="best"><b>{score}</b></td>' if is_best else f"<td>{score}</td>")
    return f'<tr class="{"fused" if name == "fused" else "other"}">{"".join(cells)}</tr>\n'


def render_rich(table: ScoreTable) -> list[list[str]]:
    """Return header and rows for a rich table: markup escaped, the lowest scores in bold."""
    from rich.markup import escape

    rows = [[escape(cell) for cell in row] for row in table.rows]
    marked = [
        [f"[bold]{cell}[/bold]" if table.is_best(i, j) else cell for j, cell in enumerate(row)]
        for i, row in enumerate(rows)
    ]
    return [[escape(cell) for cell in table.header], *marked]


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", " ".join(text.split()))
