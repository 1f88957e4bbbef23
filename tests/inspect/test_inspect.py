"""`rayfuse inspect`: its numbers, its picture in a real browser, and what it refuses."""

import json
import re
import shutil
import subprocess
import time
from itertools import permutations

import numpy as np
import pytest
from matplotlib import image

from benchmarks.synthetic import make_captured, make_corpus
from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.align.matches import Matches, keep_one_to_one
from rayfuse.align.method import build_alignment
from rayfuse.align.methods.min_edit_distance import map_to_nearest
from rayfuse.align.pair import align_texts, check_pair
from rayfuse.align.shard import align_shard
from rayfuse.align.vocab_map import build_maps, map_vocabulary
from rayfuse.config.load import read_recipe
from rayfuse.inspect.command import _read_pieces, inspect_pairs, print_report
from rayfuse.inspect.html import KINDS, build_page
from rayfuse.inspect.report import flag_token, report_pair
from rayfuse.models.text_tokenizer import build_tokenizer
from rayfuse.models.tokenizer import load_tokenizer
from rayfuse.run.layout import plan_layout
from rayfuse.runtime.console import open_console
from tests.align.test_families import LOSSY, wordpiece
from tests.fakes import (
    SAMPLE,
    byte_level_tokenizer,
    line_tokenizer,
    save_model,
    save_tokenizer,
    sentencepiece_tokenizer,
)
from tests.test_cli import rayfuse, write_recipe

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
        ("   ", "whitespace"),
        ("漢", "CJK"),
        ("({", "code"),
        ("a", ""),
        ("<FF>", "code"),  # a text of these letters, no byte
        ("", ""),  # a special token, whatever its name
    ],
)
def test_tokens_known_for_trouble_are_flagged_by_what_they_spell(token, flag):
    assert flag_token(token.encode()) == flag
    assert flag_token("漢".encode()[:2]) == "part of a character"


def test_a_special_tokens_number_is_no_digits():
    blind = build_tokenizer(wordpiece().to_str(), start_id=1, eos_id=2)
    report = report_pair(align_texts(["☃ the cat ☃"], SOURCE, blind))
    flags = {worst.token: worst.flag for worst in report.worst_tokens}
    assert flags["[0]"] == ""  # [UNK]


@pytest.mark.parametrize("method", ["bytes", "exact", "min_edit_distance", "cooccurrence"])
def test_the_methods_own_positions_are_counted(method):
    report = report_pair(align_texts(SAMPLE, SOURCE, TARGET, method))
    assert report.method == method
    corpus = make_corpus(SAMPLE, TARGET, max_tokens=1024)
    captured = make_captured(corpus, SOURCE, top_k=4)
    maps = map_vocabulary(SOURCE, TARGET)
    if method == "min_edit_distance":
        nearest = map_to_nearest(range(SOURCE.vocab_size), SOURCE, TARGET)
        maps = build_maps(nearest, SOURCE, TARGET)
    alignment = build_alignment(SOURCE, TARGET, method, maps)
    stats = align_shard(corpus, captured, alignment)[1]
    assert report.target_tokens == stats["positions"]
    assert report.share_with_signal == stats["with_signal"] / stats["positions"]
    assert report.share_one_to_one == stats["one_to_one"] / stats["positions"]


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
    text.write_text(ENGLISH + PYTHON + CHINESE + "<s> <|end|> <s>", encoding="utf-8")
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
    assert numbers["method"] == "bytes"
    assert (numbers["source_control_names"], numbers["target_control_names"]) == (1, 2)
    assert "<svg" in page.read_text(encoding="utf-8")
    assert "with a signal" in rayfuse("inspect", *pair).stdout
    for arguments, message in (
        ([pair[0]], "give a second tokenizer"),
        ([pair[0], str(tmp_path / "none")], "none"),
        ([*pair, "--text", str(tmp_path / "no.txt")], "cannot be read"),
        ([str(tmp_path / "nowhere"), pair[1]], "a folder that does not exist"),
        ([*pair, "--html", str(tmp_path / "no/page.html")], "--html is"),
        ([*pair, "--html", str(tmp_path)], "--html is"),
    ):
        done = rayfuse("inspect", *arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_a_text_is_read_byte_by_byte(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"one\r\ntwo\rthree\n")
    assert _read_pieces(path) == ["one\r\ntwo\rthree\n"]
    path.write_bytes(b"12345\xff6")
    with pytest.raises(ValueError, match=r"text.txt', which is not UTF-8 at byte 5; save it as"):
        _read_pieces(path)


def test_a_picture_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"--html is .*cannot be written"):
        inspect_pairs("/no/tokenizer", "/nor/this", tmp_path / "no.txt", tmp_path)
    with pytest.raises(ValueError, match=r"--text is"):
        inspect_pairs("a", "b", tmp_path / "no.txt", tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["exact", "min_edit_distance"])
def test_a_recipe_of_any_name_is_inspected_from_its_tokenizers_alone(method, tmp_path, capsys):
    for name, tokenizer in (("a", byte_level_tokenizer(300)), ("b", sentencepiece_tokenizer(330))):
        eos = "<|end|>" if name == "a" else "</s>"
        save_tokenizer(tokenizer, tmp_path / name, bos=None, eos=eos)
    recipe = {
        "storage": str(tmp_path / "storage"),
        "corpus": {"documents": str(tmp_path / "not-there-yet.jsonl")},
        "target": {"model": str(tmp_path / "b")},
        "sources": [{"name": name, "model": str(tmp_path / "a")} for name in ("one", "two")],
        "align": {"method": method},
    }
    path = tmp_path / "fusion.recipe"
    path.write_text(json.dumps(recipe))
    results = inspect_pairs(str(path), None, None, None)
    assert [each["source"] for each in results] == ["one", "two"]
    assert {each["method"] for each in results} == {method}
    assert results[0]["share_with_signal"] > 0
    assert results[0]["captured_mass"] is None
    print_report(results[0], open_console(to_stderr=False))
    assert "captured mass: nothing captured yet (" in capsys.readouterr().out
    done = rayfuse("inspect", str(path), "two", "--json")
    assert done.returncode == 0, done.stderr
    (pair,) = json.loads(done.stdout)["pairs"]
    assert pair["source"] == "two"
    assert not (tmp_path / "storage").exists()


def test_of_what_is_captured_the_mass_is_told(tmp_path, capsys):
    models = tmp_path / "models"
    save_model("llama", 330, models / "target")
    save_tokenizer(sentencepiece_tokenizer(330), models / "target", bos="<s>", eos="</s>")
    save_model("gpt2", 300, models / "source")
    save_tokenizer(byte_level_tokenizer(300), models / "source", bos="<|end|>", eos="<|end|>")
    path = write_recipe(tmp_path, models)
    assert inspect_pairs(str(path), None, None, None)[0]["captured_note"] == "nothing captured yet"
    layout = plan_layout(read_recipe(path), ALIGN_FACTS)
    source, target = (load_tokenizer(str(models / each)) for each in ("source", "target"))
    corpus = make_corpus(SAMPLE, target, max_tokens=512)
    captured = make_captured(corpus, source, top_k=16)
    for data, table in ((layout.corpus, corpus), (layout.captured["a"], captured)):
        data.claim({})
        data.write_shard(0, table, tokens=1)
    (numbers,) = inspect_pairs(str(path), None, None, None)
    assert 0 < numbers["kept_mass"] <= numbers["captured_mass"] < 1
    assert numbers["lost_mass"] == numbers["captured_mass"] - numbers["kept_mass"]
    print_report(numbers, open_console(to_stderr=False))
    printed = capsys.readouterr().out
    assert "kept after mapping" in printed and "lost to the tail" in printed
    assert "at a token's start" not in printed


def test_positions_inside_tokens_are_counted_and_those_of_a_captured_shard_measured(
    tmp_path, capsys
):
    models = tmp_path / "models"
    save_model("llama", 330, models / "target")
    save_tokenizer(byte_level_tokenizer(270), models / "target", bos="<|end|>", eos="<|end|>")
    save_model("gpt2", 500, models / "source")
    save_tokenizer(byte_level_tokenizer(500), models / "source", bos="<|end|>", eos="<|end|>")
    path = write_recipe(tmp_path, models, align={"inside_tokens": True})
    layout = plan_layout(read_recipe(path), ALIGN_FACTS)
    source, target = (load_tokenizer(str(models / each)) for each in ("source", "target"))
    corpus = make_corpus(SAMPLE, target, max_tokens=512)
    captured = make_captured(corpus, source, top_k=16)
    for data, table in ((layout.corpus, corpus), (layout.captured["a"], captured)):
        data.claim({})
        data.write_shard(0, table, tokens=1)
    text = tmp_path / "text.txt"
    text.write_text("".join(SAMPLE))
    (numbers,) = inspect_pairs(str(path), None, text, None)
    alignment = build_alignment(source, target, inside_tokens=True)
    stats = align_shard(corpus, captured, alignment)[1]
    assert stats["inside_tokens"] > 20
    assert numbers["captured_with_signal"] == stats["with_signal"] / stats["positions"]
    gained = numbers["captured_with_signal"] - numbers["captured_at_start"]
    assert gained == pytest.approx(stats["inside_tokens"] / stats["positions"])
    assert 0 < gained < numbers["share_inside"] < 1 - numbers["share_with_signal"] + 1e-9
    print_report(numbers, open_console(to_stderr=False))
    printed = capsys.readouterr().out
    assert "inside a token, at most" in printed and "at a token's start" in printed


def list_bands(page: str) -> list[str]:
    """List what lies between shared boundaries, by its colour."""
    kinds = {colour: kind for kind, colour in KINDS.items()}
    return [kinds[colour] for colour in re.findall(r'fill="(#\w+)" opacity', page)]


PICTURE_TOKENIZERS = {
    "bytes": SOURCE,
    "pieces": TARGET,
    "words": build_tokenizer(wordpiece().to_str(), start_id=None, eos_id=None),
    "nfc": LOSSY["qwen (NFC)"],
}


@pytest.mark.parametrize("method", ["bytes", "exact"])
@pytest.mark.parametrize(("ours", "theirs"), list(permutations(PICTURE_TOKENIZERS, 2)))
def test_what_is_drawn_is_what_is_counted(ours, theirs, method):
    source, target = PICTURE_TOKENIZERS[ours], PICTURE_TOKENIZERS[theirs]
    texts = ["The CAT sat.\n", "a b\n\n", "cats e\u0301 12", "Zwölf 漢字\n"]
    aligned = align_texts(texts, source, target, method)
    bands = list_bands(build_page(aligned, report_pair(aligned), ("s", "t")))
    one_to_one = keep_one_to_one(aligned.matches, aligned.source, aligned.target)

    def count_drawn(matches: Matches) -> int:
        at = matches.target_at  # EOS, and a blank that the text does not have, are not drawn
        return int((aligned.target.ends[at + 1] > aligned.target.ends[at]).sum())

    assert bands.count("one to one") == count_drawn(one_to_one)
    assert len(bands) - bands.count("no signal") == count_drawn(aligned.matches)


def test_the_time_of_a_picture_does_not_grow_with_a_line_of_which_little_is_drawn():
    line = "The committee met; nobody knew why. " * 300
    seconds: list[float] = []
    for text in (line, line * 20):
        aligned = align_texts([text], SOURCE, TARGET)
        report = report_pair(aligned)
        began = time.process_time()
        page = build_page(aligned, report, ("s", "t"))
        seconds.append(time.process_time() - began)
        assert 0 < len(page) < 3_000_000
    assert seconds[1] < 3 * seconds[0]  # 20 times as much text


def test_the_picture_shows_every_token_of_both_sides_once():
    text = ENGLISH + PYTHON + CHINESE
    aligned = align_texts([text], SOURCE, TARGET)
    page = build_page(aligned, report_pair(aligned), ("source", "target"))
    assert "http" not in page.replace("http://www.w3.org", "")
    shown = len(re.findall("<g><title>", page))
    placed = [side.ends[side.ends > 0] for side in (aligned.source, aligned.target)]
    assert shown == sum(len(np.unique(ends)) for ends in placed)


def test_empty_lines_take_no_line_of_the_picture_and_what_is_left_out_is_said():
    aligned = align_texts(["The cat\n\n\nsat\n"], SOURCE, TARGET)
    page = build_page(aligned, report_pair(aligned), ("s", "t"))
    assert page.count("<svg") == 2
    assert "<h2>The text</h2>" in page
    aligned = align_texts(["The cat sat.\n" * 1000], SOURCE, TARGET)
    page = build_page(aligned, report_pair(aligned), ("s", "t"))
    assert "<h2>The text: about 6,000 of its 13,000 bytes</h2>" in page


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine to draw the page with")
@pytest.mark.parametrize("text", [ENGLISH, PYTHON, CHINESE])
def test_a_browser_draws_the_picture(text, tmp_path, shared_data):
    folder = shared_data / "tokenizers"
    source, target = (load_tokenizer(str(folder / n)) for n in ("gpt-neox-20b", "phi-3-mini"))
    aligned = align_texts([text * 8], source, target)
    page, shot = tmp_path / "page.html", tmp_path / "page.png"
    names = ("gpt-neox-20b", "phi-3-mini")
    page.write_text(build_page(aligned, report_pair(aligned), names), encoding="utf-8")
    subprocess.run(
        [
            *(str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--disable-quic", "--no-first-run", "--disable-background-networking"),
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
