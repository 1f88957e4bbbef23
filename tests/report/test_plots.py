"""Plots are drawn for any results of a run, and are labelled with how they were made."""

import struct
from dataclasses import replace

import numpy as np
import pytest

from rayfuse.evaluate.bootstrap import Difference
from rayfuse.evaluate.scores import DocumentScore
from rayfuse.report.gather import Findings, SourceSelection
from rayfuse.report.plots import (
    draw_alignment,
    draw_bits_per_byte,
    draw_differences,
    draw_plots,
    draw_source_selection,
    draw_training_curves,
    smooth,
    smoothing_window,
)
from tests.report.conftest import make_curve


def width_of(png: bytes) -> int:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">I", png[16:20])[0]


def test_a_run_has_seven_pictures_twice_900_pixels_wide(findings: Findings):
    plots = draw_plots(findings)
    assert set(plots) == {
        "alignment",
        "bits_per_byte",
        "differences",
        "source_selection",
        "task_differences",
        "timeline",
        "training_curves",
    }
    assert {width_of(png) for png in plots.values()} == {1800}


def test_a_run_without_curves_has_no_picture_of_them(findings: Findings):
    assert "training_curves" not in draw_plots(replace(findings, curves={}))


def test_the_same_numbers_give_the_same_picture(findings: Findings):
    assert draw_alignment(findings.signals) == draw_alignment(findings.signals)


def test_many_domains_without_a_font_are_drawn_all_the_same(findings: Findings):
    documents = [
        DocumentScore(f"d{i}", f"領域 {i} $\\frac{{", 100 + i, 80.0 + i) for i in range(60)
    ]
    evaluations = {
        name: replace(each, documents=documents) for name, each in findings.evaluations.items()
    }
    assert width_of(draw_bits_per_byte(evaluations)) == 1800


def test_more_sources_than_colours_are_drawn(findings: Findings):
    sources = [f"source-{i}" for i in range(9)]
    selection = SourceSelection(
        {"wiki": dict.fromkeys(sources, 5), "empty": dict.fromkeys(sources, 0)}, 0, 1, 1
    )
    assert width_of(draw_source_selection(selection, sources)) == 1800


@pytest.mark.parametrize("kept", ["fused", "clm"])
def test_one_run_alone_is_drawn(findings: Findings, kept: str):
    assert width_of(draw_training_curves({kept: findings.curves[kept]})) == 1800


def test_runs_of_different_lengths_have_no_gap_to_draw(findings: Findings):
    curve = make_curve(3, 3.0)
    short = replace(
        curve,
        steps=curve.steps[:5],
        tokens=curve.tokens[:5],
        clm_loss=curve.clm_loss[:5],
        fusion_loss=curve.fusion_loss[:5],
        seconds=curve.seconds[:5],
    )
    assert width_of(draw_training_curves({"fused": findings.curves["fused"], "clm": short})) == 1800


def test_differences_without_interval_are_points():
    few = Difference(-0.01, -np.inf, np.inf, 2)
    assert width_of(draw_differences({"clm": {"all": few}})) == 1800


def test_smoothing_is_the_mean_of_the_last_steps_and_skips_gaps():
    values = np.array([1.0, 3.0, np.nan, 5.0, 7.0])
    np.testing.assert_allclose(smooth(values, 2), [1.0, 2.0, 3.0, 5.0, 6.0])
    assert np.isnan(smooth(np.full(3, np.nan), 2)).all()
    np.testing.assert_allclose(smooth(np.full(9, 2.5), 4), 2.5)


def test_short_runs_are_not_smoothed():
    assert [smoothing_window(n) for n in (0, 39, 80, 4000)] == [1, 1, 2, 100]
