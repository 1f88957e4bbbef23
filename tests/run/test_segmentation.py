"""Sources and targets that are added later reuse the stored rows and captured data."""

import json
from pathlib import Path

import numpy as np
import pytest

from rayfuse.config.capture import CaptureSettings
from rayfuse.config.load import parse_recipe
from rayfuse.models.tokenizer import load_tokenizer
from rayfuse.pipeline import prepare_run, run_stages
from rayfuse.run.layout import Layout
from rayfuse.runtime.progress import report_nothing
from rayfuse.status import verify_layout
from rayfuse.storage.codec import flatten_column
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.seal import ShardError
from tests.fakes import SAMPLE, byte_level_tokenizer, save_model, save_tokenizer

MODELS = {"a": 300, "b": 320, "target": 340, "fine": 257, "other-target": 270}
"""Vocabulary size by model. The smaller, the more tokens a text has."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Create a folder with documents and models, each with a different tokenizer."""
    folder = tmp_path_factory.mktemp("kept")
    for name, vocab in MODELS.items():
        save_model("llama", 352, folder / name)
        save_tokenizer(byte_level_tokenizer(vocab), folder / name, bos="<|end|>", eos="<|end|>")
    lines = (json.dumps({"text": text * (1 + i % 7)}) for i in range(12) for text in SAMPLE)
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


def write_recipe(folder: Path, storage: Path, *sources: str, target: str = "target", **corpus):
    return parse_recipe(
        {
            "storage": str(storage),
            "corpus": {
                "documents": str(folder / "text.jsonl"),
                "max_tokens": 100,
                "shard_tokens": 1000,
                **corpus,
            },
            "target": {"model": str(folder / target)},
            "sources": [{"name": name, "model": str(folder / name)} for name in sources],
            "evaluate": {"held_out_share": 0.2, "bootstrap_samples": 10},
            "fuse": {"skip_noise": False},  # random weights know nothing
            "train": {"rows_per_step": 8, "num_workers": 1},
        }
    )


def run(recipe, *stages: str) -> Layout:
    layout = prepare_run(recipe)
    run_stages(recipe, layout, stages, report_nothing, lambda _: None)
    return layout


def commits(data: DataSet) -> dict[int, str]:
    """Map each shard to the attempt that committed it."""
    return {shard: commit.attempt for shard, commit in data.commits().items()}


def read_texts(data: DataSet) -> list[str]:
    found = data.commits()
    tables = [data.read_shard(found[shard]) for shard in sorted(found)]
    return [text for table in tables for text in table["text"].to_pylist()]


def count_longest(data: DataSet, column: str) -> int:
    """Count the tokens of the longest row."""
    shards = [data.read_shard(commit) for commit in data.commits().values()]
    return max(int(np.diff(flatten_column(shard, column)[1]).max()) for shard in shards)


@pytest.mark.ray
def test_added_source_with_another_tokenizer_is_captured_on_the_stored_rows(
    folder, tmp_path, ray_cluster
):
    first = run(write_recipe(folder, tmp_path, "a", "b"), "corpus", "capture", "align")
    before = {name: commits(first.captured[name]) for name in ("a", "b")}
    assert count_longest(first.corpus, "target_ids") <= 100
    later = run(write_recipe(folder, tmp_path, "a", "b", "fine"), "corpus", "capture", "align")
    assert later.corpus_documents.segmentation.is_reused
    assert later.corpus.folder == first.corpus.folder
    assert {name: commits(later.captured[name]) for name in ("a", "b")} == before
    assert {name: data.folder for name, data in later.aligned.items() if name != "fine"} == {
        name: data.folder for name, data in first.aligned.items()
    }
    assert (
        count_longest(later.captured["fine"], "token_ids") > 100
    )  # rows were split for coarser tokenizers
    assert later.aligned["fine"].is_complete()
    assert later.runs[1] == first.runs[1]  # the CLM baseline is not trained again
    assert later.evaluation.scores["a"] == first.evaluation.scores["a"]


@pytest.mark.ray
def test_another_target_reuses_the_captured_data(folder, tmp_path, ray_cluster):
    first = run(write_recipe(folder, tmp_path, "a", "b"), "corpus", "capture", "align")
    before = {name: commits(first.captured[name]) for name in ("a", "b")}
    recipe = write_recipe(folder, tmp_path, "a", "b", target="other-target")
    later = run(recipe, "corpus", "align")
    assert later.corpus.folder != first.corpus.folder
    assert read_texts(later.corpus) == read_texts(first.corpus)
    assert {name: commits(later.captured[name]) for name in ("a", "b")} == before
    assert {name: data.folder for name, data in later.captured.items()} == {
        name: data.folder for name, data in first.captured.items()
    }
    for name in ("a", "b"):
        stats = [commit.stats for commit in later.aligned[name].commits().values()]
        share = sum(s["with_signal"] for s in stats) / sum(s["positions"] for s in stats)
        assert share > 0.5
    again = prepare_run(recipe)
    assert again.corpus.folder == later.corpus.folder


@pytest.mark.ray
def test_another_top_k_has_its_own_folders_and_keeps_the_old_ones_complete(
    folder, tmp_path, ray_cluster
):
    first = run(write_recipe(folder, tmp_path, "a"), "corpus", "capture")
    before = commits(first.captured["a"])
    recipe = write_recipe(folder, tmp_path, "a")
    recipe = recipe.model_copy(update={"capture": CaptureSettings(top_k=4)})
    later = run(recipe, "corpus", "capture")
    assert later.captured["a"].folder != first.captured["a"].folder
    assert later.captured["a"].is_complete()
    assert commits(first.captured["a"]) == before
    for layout in (first, later):
        assert not any(found.corrupt for found in verify_layout(layout, report_nothing).values())


@pytest.mark.ray
def test_resplit_captures_everything_again(folder, tmp_path, ray_cluster):
    first = run(write_recipe(folder, tmp_path, "a"), "corpus", "capture")
    recipe = write_recipe(folder, tmp_path, "a", "fine", resplit=True)
    layout = run(recipe, "corpus")
    assert not layout.corpus_documents.segmentation.is_reused
    assert layout.captured["a"].folder != first.captured["a"].folder
    assert count_longest(layout.corpus, "target_ids") < 100
    # Without the setting, the recipe still uses the segmentation that it has stored itself.
    assert prepare_run(write_recipe(folder, tmp_path, "a", "fine")).corpus == layout.corpus


@pytest.mark.ray
def test_lost_shard_of_reused_rows_is_split_as_at_first(folder, tmp_path, ray_cluster):
    first = run(write_recipe(folder, tmp_path, "a"), "corpus", "capture")
    texts = read_texts(first.corpus)
    recipe = write_recipe(folder, tmp_path, "a", "fine")
    layout = prepare_run(recipe)
    (tmp_path / layout.corpus.folder / layout.corpus.commits()[0].file).unlink()
    run(recipe, "corpus")
    assert read_texts(layout.corpus) == texts


@pytest.mark.ray
def test_error_names_a_missing_or_changed_tokenizer_of_the_first_segmentation(
    folder, tmp_path, ray_cluster
):
    save_model("llama", 352, folder / "passing")
    save_tokenizer(byte_level_tokenizer(290), folder / "passing", bos=None, eos="<|end|>")
    storage = tmp_path / "storage"
    run(write_recipe(folder, storage, "a", "passing"), "corpus", "capture")
    (folder / "passing").rename(tmp_path / "gone")
    load_tokenizer.cache_clear()  # the next command is another process
    recipe = write_recipe(folder, storage, "a", target="other-target")
    with pytest.raises(ValueError, match=r"passing.*corpus\.resplit: true"):
        run(recipe, "corpus")
    save_tokenizer(byte_level_tokenizer(280), folder / "passing", bos=None, eos="<|end|>")
    load_tokenizer.cache_clear()
    with pytest.raises(ValueError, match=r"passing.*has changed.*corpus\.resplit: true"):
        run(recipe, "corpus")
    record_file = prepare_run(recipe).corpus_documents.segmentation.record_file
    (storage / record_file).write_text("{")
    with pytest.raises(ShardError, match=r"no record with a checksum.*verify --repair"):
        prepare_run(recipe)
