"""A snapshot -> the page: parts that are replaced as the run proceeds, in a shell that stays."""

from dataclasses import dataclass

from rayfuse.config.text import escape_html
from rayfuse.report.page import format_seconds
from rayfuse.report.stylesheet import read_stylesheet
from rayfuse.watch.activity import render_cost, render_rejects, render_workers
from rayfuse.watch.progress import render_data_sets, render_faults, render_stages
from rayfuse.watch.snapshot import Snapshot
from rayfuse.watch.training_parts import render_plots, render_trainings

SECTIONS = {
    "stages": "Stages",
    "data-sets": "Shards",
    "workers": "Workers",
    "training": "Training",
    "rejects": "Rejected rows and documents",
    "cost": "Cost so far",
    "faults": "Files that cannot be read",
}


@dataclass(frozen=True)
class Freshness:
    """How old the numbers of a page are."""

    age_seconds: float
    """Since the store was read."""
    refresh_seconds: float
    """Between two reads."""
    fault: str | None
    """Why the last read failed; the numbers are those of the one before."""


def render_parts(snapshot: Snapshot) -> dict[str, str]:
    """Render the parts of the page by name."""
    return {
        "stages": render_stages(snapshot),
        "data-sets": render_data_sets(snapshot),
        "workers": render_workers(snapshot),
        "training": render_trainings(snapshot) + render_plots(snapshot),
        "rejects": render_rejects(snapshot),
        "cost": render_cost(snapshot),
        "faults": render_faults(snapshot),
    }


def announce(snapshot: Snapshot) -> str:
    """Describe the progress in one line for screen readers, in steps of a tenth of a stage."""
    for stage in snapshot.stages:
        if not stage.is_complete:
            share = stage.done / stage.total if stage.total else 0
            return f"Stage {stage.stage}, {int(share * 10) * 10} percent done."
    return "All stages are complete."


def render_page(snapshot: Snapshot, freshness: Freshness) -> str:
    """Render the page, which needs no script to be read; its script updates it."""
    parts = render_parts(snapshot)
    sections = "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>\n'
        f'<div data-part="{name}">{parts[name]}</div></section>\n'
        for name, title in SECTIONS.items()
    )
    number = len(snapshot.sources)
    sources = "1 source" if number == 1 else f"{number} sources"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>rayfuse watch</title>
<link rel="icon" href="data:,">
<style>{read_stylesheet()}</style>
<script src="/watch.js" defer></script>
</head>
<body class="watch" data-age="{freshness.age_seconds:.1f}"
 data-refresh="{freshness.refresh_seconds:.1f}">
<a class="skip" href="#content">Skip to the progress</a>
<header>
<h1>rayfuse watch: {sources} fused into {escape_html(snapshot.target)}</h1>
<p class="note">Storage: <code>{escape_html(snapshot.root)}</code></p>
<p class="note"><span id="age">Read {freshness.age_seconds:.0f} s ago.</span>
<span id="written">{describe_written(snapshot)}</span></p>
<p id="trouble" role="alert">{escape_html(freshness.fault or "")}</p>
<p id="announcement" class="unseen" role="status" aria-live="polite">{announce(snapshot)}</p>
<noscript><p>Without scripts this page does not update by itself: load it again.</p></noscript>
</header>
<main id="content" tabindex="-1">
{sections}</main>
</body>
</html>
"""


def describe_written(snapshot: Snapshot) -> str:
    """Describe when the run last reported a number, by the clocks of its nodes."""
    if snapshot.written_at is None:
        return "The run has not reported yet."
    seconds = max(snapshot.read_at - snapshot.written_at, 0)
    return f"The capture last reported {format_seconds(seconds)} before."
