"""Findings -> one HTML page that needs nothing but itself: no script, no link, pictures inside."""

import base64
import html
import math

import yaml

from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.evaluate.bootstrap import Difference
from rayfuse.evaluate.scores import ALL
from rayfuse.report.gather import Findings, SourceWins, StageCount
from rayfuse.report.tables import TASK_NOTE, build_table, build_task_table, render_html
from rayfuse.report.timeline import ShardSpan, share_waited, sum_busy
from rayfuse.report.verdict import MINUS, Verdict, name_domain, order_names, sign

CAPTIONS = {
    "bits_per_byte": "Each group is a domain, each bar a model: the shorter bar has spent fewer "
    "bits on the same text.",
    "differences": "Where a point and its whole line lie left of zero, the fused model is better, "
    "and not by the luck of which documents were held out.",
    "task_differences": "Where a point and its whole line lie right of zero, the fused model is "
    "better at the task; a line across zero is no claim.",
    "training_curves": "Both runs see the same rows in the same order, so where the difference "
    "stays below zero, fusion helps the target to fit the text.",
    "source_wins": "The longer a colour, the more rows of that domain this source predicts best; "
    "one colour everywhere means that the other sources add little.",
    "alignment": "The further the left bar reaches, the more of the text a source can teach; "
    "what the right bar gains over the source's own is probability lost in translation.",
    "timeline": "Each line is one worker with a source LLM: coloured while its device computed, "
    "grey while it waited for work. Dashed: nobody worked, time left out.",
}

TITLES = {
    "bits_per_byte": "Scores by domain",
    "differences": "How sure the differences are",
    "task_differences": "How sure the differences at tasks are",
    "training_curves": "Training",
    "source_wins": "What each source is good at",
    "alignment": "How much of the sources reaches the target",
    "timeline": "What the sources' devices did",
}

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1d2127; --soft: #5b6470;
  --line: #d9dee5; --card: #f5f7fa; --won: #0b6e4f; --lost: #b5480a; --unclear: #6b7280;
  --fused: #fff1e6; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --ink: #e6e9ee; --soft: #a2abb8;
  --line: #333a45; --card: #1d222a; --won: #4cc79a; --lost: #f0935a; --unclear: #9aa3b2;
  --fused: #33261b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 964px; margin: 0 auto; padding: 32px 32px 64px; }
h1 { font-size: 1.15rem; color: var(--soft); font-weight: 600; margin: 0 0 16px; }
h2 { font-size: 1.2rem; margin: 44px 0 10px; }
.verdict { border-left: 6px solid var(--unclear); background: var(--card); border-radius: 8px;
  padding: 18px 24px; }
.verdict.won { border-color: var(--won); } .verdict.lost { border-color: var(--lost); }
.verdict p.headline { font-size: 1.4rem; line-height: 1.35; font-weight: 650; margin: 0 0 10px; }
.verdict ul { margin: 0; padding-left: 20px; } .verdict li { margin: 4px 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .94rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 7px 9px; border-bottom: 1px solid var(--line); text-align: right; }
thead th { color: var(--soft); font-weight: 600; border-bottom-width: 2px; }
tbody th, thead th:first-child, .scores thead th:nth-child(2), td.role, td.name {
  text-align: left; }
td.role { color: var(--soft); white-space: nowrap; } tr.fused { background: var(--fused); }
td.best b { text-decoration: underline; text-underline-offset: 3px; }
td.none { color: var(--soft); }
figure { margin: 0; } figure img { display: block; width: 100%; height: auto; background: #fff;
  border: 1px solid var(--line); border-radius: 8px; }
figcaption, .note { color: var(--soft); font-size: .94rem; margin-top: 8px; }
details { margin: 14px 0; border: 1px solid var(--line); border-radius: 8px; padding: 10px 16px; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; margin: 12px 0;
  font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
@media print { details { border: 0; padding: 0; } figure { break-inside: avoid; } }
"""


def build_page(
    findings: Findings, verdict: Verdict, recipe: Recipe, plots: dict[str, bytes]
) -> str:
    """Return the page.

    Args:
        findings: All numbers.
        verdict: What may be claimed of them.
        recipe: The run's.
        plots: PNG pictures by name.
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
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>rayfuse report: {html.escape(_describe_run(recipe))}</h1>
{_render_verdict(verdict)}
<h2>Bits per byte on held-out text</h2>
<div class="wide">{render_html(build_table(findings.evaluations))}</div>
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
        [name, task, *_say_interval(each)]
        for task, others in findings.task_differences.items()
        for name, each in others.items()
    ]
    header = ["other model", "task", "difference", "from", "to", "questions", "fused is"]
    return (
        f'<h2>Tasks</h2>\n<div class="wide">{table}</div>\n<p class="note">{TASK_NOTE} The best of '
        "each column is underlined; a group is the mean of its tasks.</p>\n<details><summary>Fused "
        f"minus other, with 95 % intervals</summary>\n{_render_plain_table(header, rows)}</details>"
    )


def _describe_run(recipe: Recipe) -> str:
    number = len(recipe.sources)
    sources = "1 source" if number == 1 else f"{number} sources"
    return f"{sources} fused into {recipe.target.model}"


def _render_verdict(verdict: Verdict) -> str:
    items = "".join(f"<li>{html.escape(sentence)}</li>\n" for sentence in verdict.sentences)
    return (
        f'<section class="verdict {verdict.outcome}">\n'
        f'<p class="headline">{html.escape(verdict.headline)}</p>\n<ul>\n{items}</ul>\n</section>'
    )


def _render_figure(name: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    return (
        f"<h2>{TITLES[name]}</h2>\n"
        f'<figure><img alt="{html.escape(TITLES[name])}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(CAPTIONS[name])}</figcaption></figure>\n"
    )


def _render_details(findings: Findings, recipe: Recipe) -> str:
    text = yaml.safe_dump(dump_recipe(recipe), sort_keys=False, allow_unicode=True)
    parts = {
        "Fused minus other, with 95 % intervals": _render_differences(findings.differences),
        "Rows that each source wins": _render_wins(findings.wins),
        "Models and time": _render_models(findings),
        "Capturing": _render_spells(findings.spells),
        "Rows, tokens and rejects of each stage": _render_counts(findings.counts),
        "The recipe, with every default": f"<pre>{html.escape(text)}</pre>",
    }
    return "".join(
        f"<details><summary>{html.escape(title)}</summary>\n{content}</details>\n"
        for title, content in parts.items()
    )


def _render_differences(differences: dict[str, dict[str, Difference]]) -> str:
    rows = [
        [name, "all text" if group == ALL else name_domain(group), *_say_interval(each)]
        for name in order_names(differences)
        for group, each in differences[name].items()
    ]
    header = ["other model", "text", "difference", "from", "to", "documents", "fused is"]
    return _render_plain_table(header, rows)


def _say_interval(each: Difference) -> list[str]:
    bounds = [sign(each.low), sign(each.high)] if math.isfinite(each.low) else [MINUS, MINUS]
    outcome = {"unclear": "not clearly different"}.get(each.outcome, each.outcome)
    return [sign(each.difference), *bounds, f"{each.num_documents:,}", outcome]


def _render_wins(wins: SourceWins) -> str:
    sources = list(next(iter(wins.counts.values()), {}))
    rows = [
        [name_domain(domain), *(f"{count:,}" for count in row.values())]
        for domain, row in wins.counts.items()
    ]
    notes = [f"Lowest cross-entropy in nats per byte; {wins.unscored_rows:,} rows unscored."]
    if wins.shards_read < wins.num_shards:
        notes.append(f"Only the first {wins.shards_read} of {wins.num_shards:,} shards were read.")
    table = _render_plain_table(["domain", *sources], rows)
    return f'{table}<p class="note">{html.escape(" ".join(notes))}</p>'


def _render_models(findings: Findings) -> str:
    training = {name: curve.seconds.sum() for name, curve in findings.curves.items()}
    rows = [
        [
            name,
            each.model,
            say_seconds(training[name]) if name in training else "",
            say_seconds(each.seconds),
        ]
        for name, each in findings.evaluations.items()
    ]
    return _render_plain_table(["model", "folder or hub id", "training", "evaluation"], rows)


def _render_spells(spells: dict[str, list[ShardSpan]]) -> str:
    rows = [
        [
            name,
            str(len({spell.worker for spell in each})),
            f"{sum(spell.tokens for spell in each):,}",
            f"{round(sum(spell.tokens for spell in each) / sum_busy(each)):,}",
            say_seconds(sum_busy(each)),
            f"{share_waited(each):.1%}",
        ]
        for name, each in spells.items()
        if each
    ]
    header = ["source", "workers", "tokens", "tokens/s of a device", "computed", "waited"]
    return _render_plain_table(header, rows)


def _render_counts(counts: list[StageCount]) -> str:
    rows = [[c.stage, f"{c.rows:,}", f"{c.tokens:,}", f"{c.rejects:,}"] for c in counts]
    return _render_plain_table(["stage", "rows", "tokens", "rejects"], rows)


def _render_plain_table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    lines = [
        f'<tr><td class="name">{html.escape(row[0])}</td>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>\n"
        for row in rows
    ]
    body = "".join(lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n{body}</table></div>\n'


def say_seconds(seconds: float) -> str:
    """Return a time as hours, minutes and seconds, or as seconds where it is short."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
