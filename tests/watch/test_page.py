"""The page for people and screen readers: landmarks, headings, tables, plots; text is escaped."""

import math
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from rayfuse.capture.workers import WorkerState
from rayfuse.config.recipe import Recipe
from rayfuse.report.stylesheet import read_stylesheet
from rayfuse.watch.page import Freshness, announce, render_page
from rayfuse.watch.plots import Axis, Line, choose_axis, draw_lines
from rayfuse.watch.snapshot import RunReader, Snapshot
from rayfuse.watch.trainings import average
from tests.watch.runs import write_capture_log, write_report, write_training

FRESH = Freshness(2.0, 5.0, None)
VOID = {"meta", "link", "circle", "polyline", "line"}


class Page(HTMLParser):
    """Collects the elements of a page, and checks that they are nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def snapshot(recipe: Recipe) -> Snapshot:
    """A run in the middle of everything."""
    reader = RunReader(recipe)
    data = reader.layout.captured["neox"]
    data.drop_shards([2])
    write_capture_log(data)
    worker = WorkerState("node-3", 31, ["6"], time.time() - 99, True, {"2": time.time() - 40})
    write_report(data, worker)
    write_training(reader.layout, 200, outlier_at=100)
    found = reader.read()
    while found.unread:
        found = reader.read()
    return found


def test_the_page_has_landmarks_headings_in_order_and_labels(snapshot: Snapshot):
    page = Page(render_page(snapshot, FRESH))
    assert page.find("html") == [{"lang": "en"}]
    assert len(page.find("main")) == len(page.find("header")) == len(page.find("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(later <= level + 1 for level, later in pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {section["aria-labelledby"] for section in page.find("section")} <= set(ids)
    status = next(item for item in page.find("p") if item.get("role") == "status")
    assert status["aria-live"] == "polite"
    assert all(bar["aria-label"] for bar in page.find("progress"))
    regions = [item for item in page.find("div") if item.get("role") == "region"]
    assert {region["tabindex"] for region in regions} == {"0"}
    labels = [region["aria-label"] for region in regions]
    assert len(labels) == len(set(labels)) == len(page.find("table"))
    for svg in page.find("svg"):
        assert svg.get("aria-hidden") == "true" or (svg["role"], bool(svg["aria-label"])) == (
            "img",
            True,
        )


def test_every_cell_has_a_header(snapshot: Snapshot):
    text = render_page(snapshot, FRESH)
    assert {item["scope"] for item in Page(text).find("th")} == {"col", "row"}
    for table in re.findall(r"<table>(.*?)</table>", text, re.S):
        rows = re.findall(r"<tr>(.*?)</tr>", table, re.S)
        cells = {len(re.findall(r"<t[hd]", row)) for row in rows}
        assert len(cells) == 1
        assert all(row.startswith('<th scope="row"') for row in rows[1:])


def test_the_page_loads_nothing_but_its_own_script(snapshot: Snapshot):
    text = render_page(snapshot, FRESH)
    assert re.findall(r'(?:src|href)="([^"]*)"', text) == ["data:,", "/watch.js", "#content"]
    assert "url(" not in text and "@import" not in text
    assert not re.search(r"\son\w+=", text)


def test_workers_are_shown_with_their_gpu_and_their_shard(snapshot: Snapshot):
    text = render_page(snapshot, FRESH)
    row = re.search(r"<tr>[^\n]*node-3, process 31.*?</tr>", text, re.S)
    assert row is not None
    assert ">6<" in row[0]
    assert re.search(r"shard 2, for 3\d", row[0])
    assert "training fused" in text and "rank 0" in text
    assert "trained by process 77 on node-1" in text
    assert "1,234 tokens/s" in text


def test_what_comes_from_files_is_escaped(recipe: Recipe):
    reader = RunReader(recipe)
    write_report(
        reader.layout.captured["neox"], WorkerState("<script>alert(1)</script>", 1, [], 0.0)
    )
    text = render_page(reader.read(), Freshness(0.0, 5.0, "<img src=x>"))
    assert "&lt;script&gt;alert(1)" in text
    assert "<img" not in text
    assert text.count("<script") == 1


def test_the_announcement_changes_by_tenths_of_a_stage(snapshot: Snapshot):
    capture = snapshot.stages[1]
    assert (capture.stage, capture.done, capture.total) == ("capture", 7, 8)
    assert announce(replace(snapshot, stages=[capture])) == "Stage capture, 80 percent done."
    assert announce(replace(snapshot, stages=[])) == "All stages are complete."


def test_an_outlier_does_not_rule_the_axis_and_is_counted(snapshot: Snapshot):
    text = render_page(snapshot, FRESH)
    assert "Logarithmic axis. Outlying points, drawn on its edge: 2." in text
    values = [2.0 + 0.01 * step for step in range(200)]
    plain = choose_axis(values, is_log=True)
    spoiled = choose_axis([*values, 1e12, math.ulp(0.0)], is_log=True)
    assert spoiled.high < 1.1 * plain.high
    assert spoiled.low > plain.low / 1.1


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [-1.0, 3.0], [5.0, 5.0], []])
@pytest.mark.parametrize("is_log", [False, True])
def test_any_values_give_an_axis_with_ticks_inside(values: list[float], is_log: bool):
    axis = choose_axis(values, is_log=is_log)
    assert axis.low < axis.high
    assert all(axis.low <= tick <= axis.high for tick in axis.list_ticks())
    assert all(0 <= axis.place(value) <= 1 for value in values)


def test_lines_are_told_apart_without_colour_and_described_in_text():
    lines = [Line(name, [(1.0, 1.0), (2.0, 3.0)]) for name in ("a", "b", "c")]
    text = draw_lines("loss", [*lines, Line("none", [])], Axis(0.0, 4.0, False), "All.")
    dashes = re.findall(r'stroke-dasharray="([^"]*)"', text)
    assert len(set(dashes[:3])) == 3
    assert dashes[:3] == dashes[3:]  # the legend's
    assert 'aria-label="loss, steps 1 to 2: a from 1 to 3; b from 1 to 3; c from 1 to 3."' in text


def test_points_are_means_of_equal_groups_without_what_is_not_finite():
    records = [{"step": step, "loss": float(step)} for step in range(1, 8)]
    records[2]["loss"] = None
    records[3]["loss"] = math.nan
    assert [*average(records, "loss", 4)] == [(2, 1.5), (6, 5.5), (7, 7.0)]


def contrast(one: str, two: str) -> float:
    """Compute the contrast of two colours by WCAG 2.1."""
    lights: list[float] = []
    for colour in (one, two):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        lights.append(sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True)))
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_text_has_enough_contrast_in_light_and_dark():
    schemes = re.findall(r":root \{(.*?)\}", read_stylesheet(), re.S)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", scheme))
        for text in ("ink", "soft", "won", "lost", "unclear"):
            assert contrast(colours[text], colours["paper"]) >= 4.5
        for text in ("ink", "soft"):
            assert contrast(colours[text], colours["card"]) >= 4.5
