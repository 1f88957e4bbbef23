"""Results of older alignment code are never reused."""

from dataclasses import replace
from pathlib import Path

import pytest

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.config.load import read_recipe
from rayfuse.run.layout import plan_layout
from tests.fakes import byte_level_tokenizer, save_model, save_tokenizer, sentencepiece_tokenizer
from tests.test_cli import write_recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_model("llama", 330, root / "target")
    save_tokenizer(sentencepiece_tokenizer(330), root / "target", bos="<s>", eos="</s>")
    save_model("gpt2", 300, root / "source")
    save_tokenizer(byte_level_tokenizer(300), root / "source", bos="<|end|>", eos="<|end|>")
    return root


@pytest.mark.parametrize("method", ["min_edit_distance", "cooccurrence"])
def test_a_new_version_of_alignment_renames_maps_rows_and_runs(method, models, tmp_path):
    path = write_recipe(tmp_path, models, align={"method": method})
    recipe = read_recipe(path)
    now = plan_layout(recipe, ALIGN_FACTS)
    older = replace(ALIGN_FACTS, version=ALIGN_FACTS.version - 1)
    before = plan_layout(recipe, older)
    assert now.map_files["a"] != before.map_files["a"]
    assert now.aligned["a"].folder != before.aligned["a"].folder
    assert now.captured["a"].folder == before.captured["a"].folder
    (fused, clm), (old_fused, old_clm) = now.runs, before.runs
    assert fused.folder != old_fused.folder
    assert clm.folder == old_clm.folder
