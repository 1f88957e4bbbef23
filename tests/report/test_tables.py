"""One table in four forms, the lowest of each column marked."""

from dataclasses import replace

from rayfuse.config.text import escape_markdown
from rayfuse.evaluate.scores import DocumentScore, Evaluation
from rayfuse.report.gather import Findings
from rayfuse.report.tables import (
    build_table,
    build_task_table,
    render_html,
    render_markdown,
    render_rich,
    render_tables,
)
from tests.report.conftest import HOSTILE


def evaluate(name: str, *nats: float, domains: str = "ab") -> Evaluation:
    documents = [
        DocumentScore(f"d{i}", domains[i], 1, value * 0.6931471805599453)
        for i, value in enumerate(nats)
    ]
    role = "fused" if name == "fused" else "source"
    return Evaluation(name, role, "folder", documents, 1.0)


TWO = {"mpt": evaluate("mpt", 1.0, 4.0), "fused": evaluate("fused", 2.0, 1.0)}


def test_the_lowest_of_each_column_is_best():
    table = build_table(TWO)
    assert table.header == ["model", "what it is", "all", "a", "b"]
    assert table.rows == [
        ["mpt", "source", "2.5000", "1.0000", "4.0000"],
        ["fused", "fused target", "1.5000", "2.0000", "1.0000"],
    ]
    assert table.best == [1, 0, 1]


def test_text_of_one_domain_has_one_column():
    table = build_table({"fused": evaluate("fused", 1.0, 2.0, domains="aa")})
    assert table.header == ["model", "what it is", "all"]


def test_markdown_has_a_line_a_model_and_the_best_in_bold():
    assert render_markdown(build_table(TWO)) == (
        "| model | what it is | all | a | b |\n"
        "| --- | --- | ---: | ---: | ---: |\n"
        "| mpt | source | 2.5000 | **1.0000** | 4.0000 |\n"
        "| fused | fused target | **1.5000** | 2.0000 | **1.0000** |\n"
    )


def test_rich_rows_are_as_many_and_bold_where_best():
    header, *rows = render_rich(build_table(TWO))
    assert header[2].plain == "all"
    assert [cell.plain for cell in rows[1]] == [
        "fused",
        "fused target",
        "1.5000",
        "2.0000",
        "1.0000",
    ]
    assert [cell.style for cell in rows[1]] == ["", "", "bold", "", "bold"]


def test_html_marks_the_best_and_the_fused_row():
    text = render_html(build_table(TWO))
    assert text.count('<td class="best">') == 3
    assert text.count('<tr class="fused">') == 1


def test_hostile_domains_stay_text_in_every_form(findings: Findings):
    table = build_table(findings.evaluations)
    assert "<script>" not in render_html(table)
    assert "&lt;script&gt;" in render_html(table)
    columns = {line.replace(r"\|", "").count("|") for line in render_markdown(table).splitlines()}
    assert columns == {len(table.header) + 1}
    assert "\n" not in escape_markdown("a\nb")
    assert escape_markdown(HOSTILE).startswith(r"\<script\>")


def test_control_characters_of_a_domain_are_signs_in_every_form():
    table = build_table({"fused": evaluate("fused", 1.0, 2.0, domains="\x1bb")})
    cells = "".join(cell.plain for row in render_rich(table) for cell in row)
    for text in (render_html(table), render_markdown(table), cells):
        assert "\x1b" not in text
        assert "\u241b" in text


def test_the_table_of_tasks_shows_the_better_direction_and_missing_scores(findings: Findings):
    table = build_task_table(findings.evaluations, findings.task_scores)
    assert table.header[2:] == ["choose, acc \u2191", f"{HOSTILE}, bits_per_byte \u2193"]
    names = list(findings.evaluations)
    lowest = min(findings.task_scores[HOSTILE].values(), key=lambda score: score.value)
    assert [names[row] for row in table.best] == ["fused", lowest.name]
    by_name = {row[0]: row[2:] for row in table.rows}
    assert by_name["ensemble"][1] == "\u2013" != by_name["ensemble"][0]
    assert by_name["merged"] == ["\u2013", "\u2013"]
    text = render_tables(findings)
    assert text.startswith(render_markdown(build_table(findings.evaluations)))
    assert render_markdown(table) in text
    silent = replace(findings, task_scores={}, task_differences={})
    assert render_tables(silent) == render_markdown(build_table(findings.evaluations))
