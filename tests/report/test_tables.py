"""One table in four forms, the lowest of each column marked."""

from rayfuse.evaluate.scores import DocumentScore, Evaluation
from rayfuse.report.gather import Findings
from rayfuse.report.tables import (
    build_table,
    escape_markdown,
    render_html,
    render_markdown,
    render_rich,
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
    assert header[2] == "all"
    assert rows[1] == ["fused", "fused target", "[bold]1.5000[/bold]", "2.0000",
                       "[bold]1.0000[/bold]"]  # fmt: skip


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
