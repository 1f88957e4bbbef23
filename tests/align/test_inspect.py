"""`rayfuse inspect`: its numbers, its picture in a real browser, and what it refuses."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib import image

from rayfuse.align.inspect import align_texts, check_pair, flag_token, report_pair
from rayfuse.align.picture import KINDS, build_picture
from rayfuse.tokens import build_tokenizer
from tests.fakes import (
    SAMPLE,
    byte_level_tokenizer,
    line_tokenizer,
    save_tokenizer,
    sentencepiece_tokenizer,
)
from tests.test_cli import rayfuse

SOURCE = build_tokenizer(byte_level_tokenizer(320).to_str(), start_id=0, eos_id=0)
TARGET = build_tokenizer(sentencepiece_tokenizer(340).to_str(), start_id=1, eos_id=2)
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")

ENGLISH = "The committee's 1,234 members met in Zürich; nobody knew why.\n"
PYTHON = "def mean(values):\n    return sum(values) / len(values)  # [0, 1]\n"
CHINESE = "今天天气很好，我们去公园散步。\n"


def test_every_target_position_is_counted_once():
    report = report_pair(align_texts(SAMPLE, SOURCE, TARGET))
    lost = report.no_shared_boundary + sum(report.unplaced.values())
    assert round(report.share_with_signal * report.target_tokens) + lost == report.target_tokens
    assert 0 < report.share_one_to_one <= report.share_with_signal <= 1
    assert sum(worst.without_signal for worst in report.worst_tokens) <= lost
    for worst in report.worst_tokens:
        assert 0 < worst.without_signal <= worst.occurrences


def test_a_tokenizer_with_itself_has_nothing_lost():
    report = report_pair(align_texts(SAMPLE, SOURCE, SOURCE))
    assert (report.share_with_signal, report.share_one_to_one) == (1.0, 1.0)
    assert not report.worst_tokens


@pytest.mark.parametrize(
    ("token", "flag"),
    [
        ("12", "digits"),
        ("\n\n", "newlines"),
        ("   ", "blanks"),
        ("漢", "CJK"),
        ("({", "code"),
        ("a", ""),
        ("<E6><BC>", "part of a character"),
    ],
)
def test_tokens_known_for_trouble_are_flagged(token, flag):
    assert flag_token(token) == flag


def test_tokenizers_that_share_no_boundary_are_refused_with_a_text_on_which_they_differ():
    blind = build_tokenizer(line_tokenizer().to_str(), start_id=None, eos_id=1)
    with pytest.raises(ValueError, match=r"cannot be aligned.*'Hello world' is"):
        check_pair(blind, TARGET)


def test_the_command_prints_one_object_and_names_what_it_cannot_read(tmp_path):
    for name, tokenizer in (("a", byte_level_tokenizer(300)), ("b", sentencepiece_tokenizer(330))):
        save_tokenizer(
            tokenizer, tmp_path / name, bos=None, eos="<|end|>" if name == "a" else "</s>"
        )
    text = tmp_path / "text.txt"
    text.write_text(ENGLISH + PYTHON + CHINESE, encoding="utf-8")
    page = tmp_path / "page.html"
    pair = [str(tmp_path / "a"), str(tmp_path / "b")]
    done = rayfuse("inspect", *pair, "--text", str(text), "--html", str(page), "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    numbers = json.loads(line)
    assert {
        *("target_tokens", "source_tokens", "share_with_signal", "share_one_to_one"),
        *("unplaced", "tokens_per_second", "worst_tokens"),
    } <= set(numbers)
    assert "<svg" in page.read_text(encoding="utf-8")
    assert "with a signal" in rayfuse("inspect", *pair).stdout
    for arguments, message in (
        ([pair[0]], "give a second tokenizer"),
        ([pair[0], str(tmp_path / "none")], "none"),
        ([*pair, "--text", str(tmp_path / "no.txt")], "cannot be read"),
    ):
        done = rayfuse("inspect", *arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_the_picture_shows_every_token_of_both_sides_once():
    text = ENGLISH + PYTHON + CHINESE
    aligned = align_texts([text], SOURCE, TARGET)
    page = build_picture(aligned, report_pair(aligned), ("source", "target"))
    assert "http" not in page.replace("http://www.w3.org", "")
    shown = len(re.findall("<g><title>", page))
    placed = [side.ends[side.ends > 0] for side in (aligned.source, aligned.target)]
    assert shown == sum(len(np.unique(ends)) for ends in placed)


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine to draw the page with")
@pytest.mark.parametrize("text", [ENGLISH, PYTHON, CHINESE])
def test_a_browser_draws_the_picture(text, tmp_path, shared_data):
    from rayfuse.tokens import load_tokenizer

    folder = shared_data / "tokenizers"
    source, target = (load_tokenizer(str(folder / n)) for n in ("gpt-neox-20b", "phi-3-mini"))
    aligned = align_texts([text * 8], source, target)
    page, shot = tmp_path / "page.html", tmp_path / "page.png"
    names = ("gpt-neox-20b", "phi-3-mini")
    page.write_text(build_picture(aligned, report_pair(aligned), names), encoding="utf-8")
    subprocess.run(
        [
            *(str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--screenshot={shot}", "--window-size=1100,1600", page.as_uri()),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    pixels = (image.imread(shot)[..., :3] * 255).round().astype(int)
    assert pixels.shape[:2] == (1600, 1100)
    # The bands between shared boundaries are there, in the colour of one token to one.
    colour = KINDS["one to one"]
    band = [round(255 - 0.28 * (255 - int(colour[i : i + 2], 16))) for i in (1, 3, 5)]
    is_band = (np.abs(pixels - band) <= 2).all(axis=2)
    assert is_band.sum() > 20_000
    columns = np.flatnonzero(is_band.any(axis=0))
    assert columns.max() - columns.min() > 200  # as wide as its lines, not a heap
