"""The results of a run -> one self-contained HTML page: no scripts, no links, plots embedded."""

import base64
import math

import yaml

from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.config.text import escape_html
from rayfuse.evaluate.bootstrap import Difference
from rayfuse.evaluate.scores import ALL
from rayfuse.report.gather import Findings, SourceSelection, StageCount
from rayfuse.report.spans import ShardSpan, share_waited, sum_busy
from rayfuse.report.stylesheet import read_stylesheet
from rayfuse.report.tables import TASK_NOTE, build_table, build_task_table, render_html
from rayfuse.report.verdict import MINUS, Verdict, format_signed, name_domain, order_names

CAPTIONS = {
    "bits_per_byte": "Each group is a domain, each bar a model: a shorter bar means fewer bits "
    "per byte, a lower NLL of the same text.",
    "differences": "If a point and its entire interval lie left of zero, the fused model is "
    "better, and the choice of held-out documents does not explain it.",
    "task_differences": "If a point and its entire interval lie right of zero, the fused model is "
    "better at the task; an interval that includes zero supports no claim.",
    "training_curves": "Both runs see the same rows in the same order, so a difference below zero "
    "means that fusion helps the target to fit the text.",
    "source_selection": "In how many rows of each domain a source has the lowest NLL per byte; one "
    "colour everywhere means that the other sources add little.",
    "alignment": "Left: the share of target positions for which a source has a distribution. "
    "Right: the difference to the bar in the source's own tokens is probability lost in alignment.",
    "timeline": "Each row is one worker with a source LLM: coloured while its device computed, "
    "grey while it waited for work. Dashed: no worker was busy, the pause is skipped.",
}

TITLES = {
    "bits_per_byte": "Scores by domain",
    "differences": "Differences, with intervals",
    "task_differences": "Differences at tasks, with intervals",
    "training_curves": "Training",
    "source_selection": "The best source of each row",
    "alignment": "How much of the sources' distributions reaches the target",
    "timeline": "Busy and idle time of the sources' devices",
}


def build_page(
    findings: Findings, verdict: Verdict, recipe: Recipe, plots: dict[str, bytes]
) -> str:
    """Render the page.

    Args:
        findings: The results.
        verdict: The claims that they support.
        recipe: The run's.
        plots: PNG files by name.
    """
    figures = "".join(_render_figure(name, plots[name]) for name in TITLES if name in plots)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>rayfuse report</title>
<style>{read_stylesheet()}</style>
</head>
<body>
<main>
<h1>rayfuse report: {escape_html(_describe_run(recipe))}</h1>
{_render_verdict(verdict)}
<h2>Bits per byte on held-out text</h2>
{wrap_wide(render_html(build_table(findings.evaluations)), "Bits per byte")}
<p class="note">Lower is better; the lowest of each column is underlined. Bytes are the same for
every tokenizer, so these numbers compare between models.</p>
{_render_tasks(findings)}
{figures}
<h2>Details</h2>
{_render_details(findings, recipe)}
</main>
</body>
</html>
"""


def _render_tasks(findings: Findings) -> str:
    if not findings.task_scores:
        return ""
    table = render_html(build_task_table(findings.evaluations, findings.task_scores))
    rows = [
        [name, task, *_format_interval(difference)]
        for task, others in findings.task_differences.items()
        for name, difference in others.items()
    ]
    header = ["other model", "task", "difference", "from", "to", "questions", "fused is"]
    return (
        f'<h2>Tasks</h2>\n{wrap_wide(table, "Tasks")}\n<p class="note">{TASK_NOTE} The best of '
        "each column is underlined; a group is the mean of its tasks.</p>\n<details><summary>Fused "
        f"minus other, with 95 % intervals</summary>\n"
        f"{render_plain_table('Differences at tasks', header, rows)}</details>"
    )


def _describe_run(recipe: Recipe) -> str:
    number = len(recipe.sources)
    sources = "1 source" if number == 1 else f"{number} sources"
    return f"{sources} fused into {recipe.target.model}"


def _render_verdict(verdict: Verdict) -> str:
    items = "".join(f"<li>{escape_html(sentence)}</li>\n" for sentence in verdict.sentences)
    by_gain = {"better": "won", "worse": "lost", "unclear": "unclear"}
    mood = by_gain[verdict.against_clm] if verdict.against_clm else verdict.outcome
    return (
        f'<section class="verdict {mood}">\n'
        f'<p class="headline">{escape_html(verdict.headline)}</p>\n<ul>\n{items}</ul>\n</section>'
    )


def _render_figure(name: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    return (
        f"<h2>{TITLES[name]}</h2>\n"
        f'<figure><img alt="{escape_html(TITLES[name])}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape_html(CAPTIONS[name])}</figcaption></figure>\n"
    )


def _render_details(findings: Findings, recipe: Recipe) -> str:
    text = yaml.safe_dump(dump_recipe(recipe), sort_keys=False, allow_unicode=True)
    parts = {
        "Fused minus other, with 95 % intervals": _render_differences(findings.differences),
        "Rows in which each source has the lowest NLL": _render_selection(findings.selection),
        "Models and time": _render_models(findings),
        "Capture": _render_spans(findings.spans),
        "Rows, tokens and rejects of each stage": _render_counts(findings.counts),
        "The recipe, with every default": f"<pre>{escape_html(text)}</pre>",
    }
    return "".join(
        f"<details><summary>{escape_html(title)}</summary>\n{content}</details>\n"
        for title, content in parts.items()
    )


def _render_differences(differences: dict[str, dict[str, Difference]]) -> str:
    rows = [
        [name, "all text" if group == ALL else name_domain(group), *_format_interval(difference)]
        for name in order_names(differences)
        for group, difference in differences[name].items()
    ]
    header = ["other model", "text", "difference", "from", "to", "documents", "fused is"]
    return render_plain_table("Differences", header, rows)


def _format_interval(difference: Difference) -> list[str]:
    low, high = difference.low, difference.high
    bounds = [format_signed(low), format_signed(high)] if math.isfinite(low) else [MINUS, MINUS]
    outcome = {"unclear": "not clearly different"}.get(difference.outcome, difference.outcome)
    return [
        format_signed(difference.difference),
        *bounds,
        f"{difference.num_documents:,}",
        outcome,
    ]


def _render_selection(selection: SourceSelection) -> str:
    sources = list(next(iter(selection.counts.values()), {}))
    rows = [
        [name_domain(domain), *(f"{count:,}" for count in row.values())]
        for domain, row in selection.counts.items()
    ]
    notes = [f"NLL in nats per byte; {selection.unscored_rows:,} rows have no score."]
    if selection.shards_read < selection.num_shards:
        notes.append(
            f"Only the first {selection.shards_read} of {selection.num_shards:,} shards were read."
        )
    table = render_plain_table("Best source by domain", ["domain", *sources], rows)
    return f'{table}<p class="note">{escape_html(" ".join(notes))}</p>'


def _render_models(findings: Findings) -> str:
    training = {name: curve.seconds.sum() for name, curve in findings.curves.items()}
    rows = [
        [
            name,
            evaluation.model,
            format_seconds(training[name]) if name in training else "",
            format_seconds(evaluation.seconds),
        ]
        for name, evaluation in findings.evaluations.items()
    ]
    header = ["model", "folder or hub id", "training", "evaluation"]
    return render_plain_table("Models and time", header, rows)


def _render_spans(spans: dict[str, list[ShardSpan]]) -> str:
    rows = [
        [
            source,
            str(len({span.worker for span in shards})),
            f"{sum(span.tokens for span in shards):,}",
            f"{round(sum(span.tokens for span in shards) / sum_busy(shards)):,}",
            format_seconds(sum_busy(shards)),
            f"{share_waited(shards):.1%}",
        ]
        for source, shards in spans.items()
        if shards
    ]
    header = ["source", "workers", "tokens", "tokens/s per device", "busy", "idle"]
    return render_plain_table("Capture", header, rows)


def _render_counts(counts: list[StageCount]) -> str:
    rows = [[c.stage, f"{c.rows:,}", f"{c.tokens:,}", f"{c.rejects:,}"] for c in counts]
    return render_plain_table("Stages", ["stage", "rows", "tokens", "rejects"], rows)


def render_plain_table(title: str, header: list[str], rows: list[list[str]]) -> str:
    """Render a table whose first column names the rows; it scrolls by itself where it is too wide.

    Args:
        title: Names the scrolling region for screen readers; no other on the page has it.
        header: A cell for each column.
        rows: As many cells each.
    """
    head = "".join(f'<th scope="col">{escape_html(cell)}</th>' for cell in header)
    lines = [
        f'<tr><th scope="row">{escape_html(row[0])}</th>'
        + "".join(f"<td>{escape_html(cell)}</td>" for cell in row[1:])
        + "</tr>\n"
        for row in rows
    ]
    body = "".join(lines)
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    return wrap_wide(table, title) + "\n"


def wrap_wide(table: str, title: str) -> str:
    """Put a table into a region that scrolls sideways, also by keyboard."""
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape_html(title)}">'
        f"{table}</div>"
    )


def format_seconds(seconds: float) -> str:
    """Format a time as hours, minutes and seconds, or as seconds if it is short."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
