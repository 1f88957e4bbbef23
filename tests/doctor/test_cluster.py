"""`doctor` on a real cluster: nothing where all is well, and each planted fault."""

import json
from pathlib import Path

import pytest

from rayfuse.config.load import parse_recipe
from rayfuse.config.recipe import Recipe
from rayfuse.doctor.command import examine
from tests.fakes import SAMPLE, byte_level_tokenizer, save_model, save_tokenizer

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    save_model("gpt2", 300, folder / "model")
    save_tokenizer(byte_level_tokenizer(300), folder / "model", bos="<|end|>", eos="<|end|>")
    (folder / "docs.jsonl").write_text(json.dumps({"text": SAMPLE[0]}) + "\n")
    return folder


def recipe_of(folder: Path, storage: Path, **source: object) -> Recipe:
    return parse_recipe(
        {
            "storage": str(storage),
            "corpus": {"documents": str(folder / "docs.jsonl"), "max_tokens": 64},
            "target": {"model": str(folder / "model")},
            "sources": [{"name": "a", "model": str(folder / "model")} | source],
        }
    )


def test_a_good_cluster_has_no_findings_and_keeps_nothing(folder, tmp_path, ray_cluster):
    assert examine(recipe_of(folder, tmp_path / "storage")) == []
    assert not [*(tmp_path / "storage").iterdir()]


def test_a_relative_storage_and_a_tokenizer_without_roles(
    folder, tmp_path, ray_cluster, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert examine(recipe_of(folder, Path("run"))) == []
    save_model("gpt2", 300, tmp_path / "model")
    save_tokenizer(byte_level_tokenizer(300), tmp_path / "model", bos=None, eos=None)
    found = examine(recipe_of(folder, Path("run"), model=str(tmp_path / "model")))
    assert [(finding.check, finding.severity) for finding in found] == [("tokenizers", "warning")]
    assert "BOS" in found[0].text


def test_what_is_wrong_with_a_recipe_is_found_on_the_cluster(folder, tmp_path, ray_cluster):
    gone = recipe_of(folder, Path("/proc/storage"), model="/nowhere/model")
    found = examine(gone)
    assert [finding.check for finding in found] == ["recipe", "storage", "storage", "models"]
    asking = recipe_of(folder, tmp_path, gpus=1, accelerator_type="L4", min_actors=2)
    (finding,) = examine(asking)
    assert "source a needs 2 x 1 GPUs of kind L4" in finding.text
    assert finding.severity == "error"
