"""The parts of the page about stages, shards and files that cannot be read."""

from rayfuse.config.text import escape_html, show_on_one_line
from rayfuse.report.page import format_seconds, wrap_wide
from rayfuse.watch.counts import DataSetState
from rayfuse.watch.snapshot import Snapshot, StageState

MAX_FAULTS = 20
"""Files that are listed."""


TEXT_COLUMNS = frozenset({"state", "done", "node and process", "GPU", "reason"})
"""Columns of words, which begin at the left; numbers end at the right."""


def render_table(title: str, header: list[str], rows: list[list[str]]) -> str:
    """Render a table of cells that are HTML already; the first of each row is its header."""
    kinds = [' class="text"' if cell in TEXT_COLUMNS else "" for cell in header]
    head = "".join(
        f'<th scope="col"{kind}>{escape_html(cell)}</th>'
        for cell, kind in zip(header, kinds, strict=True)
    )
    lines = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row[1:], kinds[1:], strict=True))
        + "</tr>\n"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table>"
    return wrap_wide(table, f"Table: {title}") + "\n"


def render_stages(snapshot: Snapshot) -> str:
    """Render a row for each stage: how much is done, and the time left."""
    rows = [
        [stage.stage, _describe_state(stage), _render_bar(stage), _show_seconds(stage.seconds_left)]
        for stage in snapshot.stages
    ]
    return render_table("stages", ["stage", "state", "done", "time left"], rows)


def _describe_state(stage: StageState) -> str:
    if stage.is_complete:
        return "complete"
    return "in progress" if stage.done else "not started"


def _render_bar(stage: StageState) -> str:
    done = stage.total if stage.is_complete and stage.total else stage.done
    total = "?" if stage.total is None else f"{stage.total:,}"
    text = f"{stage.done:,} of {total} {stage.unit}"
    if not stage.total:
        return text
    bar = (
        f'<progress max="{stage.total}" value="{done}" '
        f'aria-label="{stage.stage}: {text}"></progress>'
    )
    return f"{bar} {text}"


def _show_seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"about {format_seconds(seconds)}"


def render_data_sets(snapshot: Snapshot) -> str:
    """Render a row for each data set, with the numbers of `rayfuse status`."""
    rows = [
        [
            escape_html(show_on_one_line(data.label)),
            f"{data.shards:,} of {'?' if data.num_shards is None else f'{data.num_shards:,}'}",
            f"{data.rows:,}",
            f"{data.tokens:,}",
            f"{sum(data.rejects.values()):,}",
            *_describe_rate(data, snapshot.read_at),
        ]
        for data in snapshot.data_sets
    ]
    header = ["data set", "shards", "rows", "tokens", "rejected", "speed", "state"]
    table = render_table("shards", header, rows)
    if not snapshot.unread:
        return table
    return (
        f'{table}<p class="note">Records still to be read: {snapshot.unread:,}. Rows, tokens and '
        "rejects are without theirs.</p>\n"
    )


def _describe_rate(data: DataSetState, now: float) -> tuple[str, str]:
    """Describe the speed of a data set and its state."""
    if data.is_complete:
        return "", "complete"
    if not data.log:
        return "", "in progress" if data.shards else "not started"
    last = data.log[-1]
    ago = format_seconds(max(now - last["time"], 0))
    return f"{last['tokens_per_second']:,.0f} tokens/s", f"in progress, reported {ago} before"


def render_faults(snapshot: Snapshot) -> str:
    """Render the files that cannot be read; a file that is being written appears here briefly."""
    if not snapshot.faults:
        return '<p class="note">None.</p>\n'
    shown = "".join(f"<li>{escape_html(fault)}</li>\n" for fault in snapshot.faults[:MAX_FAULTS])
    more = len(snapshot.faults) - MAX_FAULTS
    rest = f'<p class="note">And {more:,} more.</p>\n' if more > 0 else ""
    return f"<ul>\n{shown}</ul>\n{rest}"
