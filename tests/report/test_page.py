"""The page and the model card are self-contained, and safe to open."""

import re

import yaml

from rayfuse.config.load import parse_recipe
from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.report.gather import Findings
from rayfuse.report.model_card import build_model_card
from rayfuse.report.page import build_page, format_seconds
from rayfuse.report.verdict import judge

PNG = {"bits_per_byte": b"\x89PNG", "alignment": b"\x89PNG"}


def test_the_page_fetches_nothing_and_runs_nothing(findings: Findings, recipe: Recipe):
    page = build_page(findings, judge(findings, recipe), recipe, PNG)
    targets = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page)
    assert len(targets) == 2
    assert all(target.startswith("data:image/png;base64,") for target in targets)
    assert "<script" not in page
    assert "url(" not in page
    assert "@import" not in page


def test_what_comes_from_data_is_escaped(findings: Findings, recipe: Recipe):
    page = build_page(findings, judge(findings, recipe), recipe, PNG)
    assert "&lt;script&gt;" in page
    assert "text/<b>" not in page
    assert "text/&lt;b&gt;" in page


def test_the_verdict_stands_before_the_table_and_the_pictures(findings: Findings, recipe: Recipe):
    verdict = judge(findings, recipe)
    page = build_page(findings, verdict, recipe, PNG)
    places = [page.index(part) for part in (verdict.headline, '<table class="scores">', "<img")]
    assert places == sorted(places)
    assert 'class="verdict won"' in page  # against CLM; a source is better, which the list says


def test_a_count_on_a_part_of_the_shards_is_marked(findings: Findings, recipe: Recipe):
    page = build_page(findings, judge(findings, recipe), recipe, {})
    assert "Only the first 64 of 112 shards were read." in page


def test_times_are_formatted_in_fitting_units():
    texts = [format_seconds(seconds) for seconds in (2.34, 61.0, 3725.0)]
    assert texts == ["2.3 s", "1 min 01 s", "1 h 02 min"]


def test_the_model_card_holds_the_recipe_and_the_verdict(winning: Findings, recipe: Recipe):
    card = build_model_card(winning, judge(winning, recipe), recipe, {})
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "some/target"
    assert "The fused model wins: it is better than CLM" in body
    assert "- Source coder: `some/coder`" in body
    written = body.split("```yaml\n")[1].split("```")[0]
    assert parse_recipe(yaml.safe_load(written)) == recipe
    assert dump_recipe(recipe) == yaml.safe_load(written)


def test_every_table_scrolls_by_keyboard_under_a_name_of_its_own(
    findings: Findings, recipe: Recipe
):
    page = build_page(findings, judge(findings, recipe), recipe, {})
    regions = re.findall(r'<div class="wide" role="region" tabindex="0" aria-label="(.+?)">', page)
    assert len(regions) == len(set(regions)) == page.count("<table")
    assert set(re.findall(r"<th(?! scope=|ead)[^>]*>", page)) == set()
