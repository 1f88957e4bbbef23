"""A run whose source and target have LoRA adapters, from text to report."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rayfuse.capture.engines.transformers_engine import TransformersEngine
from rayfuse.config.load import read_recipe
from rayfuse.config.models import ModelSettings
from rayfuse.config.recipe import Recipe
from rayfuse.evaluate.bits_per_byte import load_scored_model, score_rows
from rayfuse.evaluate.results import read_evaluation
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.pipeline import STAGES, prepare_run, run_stages
from rayfuse.run.layout import Layout
from rayfuse.runtime.progress import report_nothing
from rayfuse.storage.codec import flatten_column
from tests.fakes import copy_tokenizer, save_adapter
from tests.small_run import write_recipe

pytest.importorskip("peft")

pytestmark = pytest.mark.ray

LAYERS = {"neox": ["query_key_value", "dense_h_to_4h"], "target": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory, ray_cluster) -> tuple[Recipe, Layout, Path]:
    """Finish a run with a learning rate of nearly 0, and save the merged models beside it."""
    folder = tmp_path_factory.mktemp("adapters")
    path = write_recipe(folder)
    for name, layers in LAYERS.items():
        save_adapter(folder / name, folder / f"{name}-adapter", target_modules=layers)
        save_merged(folder / name, folder / f"{name}-adapter", folder / f"{name}-merged")
    settings = ["train.num_workers=1", "train.baseline=false", "train.learning_rate=1e-12"]
    settings += [f"target.adapter={folder}/target-adapter"]
    settings += [f"sources.neox.adapter={folder}/neox-adapter"]
    recipe = read_recipe(path, settings)
    layout = prepare_run(recipe)
    run_stages(recipe, layout, STAGES, report_nothing, lambda _: None)
    return recipe, layout, folder


def save_merged(base: Path, adapter: Path, folder: Path) -> None:
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    adapted.merge_and_unload().save_pretrained(folder)
    copy_tokenizer(base, folder)


def test_captured_rows_are_those_of_the_merged_model(run):
    recipe, layout, folder = run
    (source,) = recipe.sources
    merged = source.model_copy(update={"model": str(folder / "neox-merged"), "adapter": None})
    engine, tokenizer = TransformersEngine(merged, recipe.capture), load_recipe_tokenizer(merged)
    rows = layout.corpus.read_shard(layout.corpus.read_commit(0))
    ids = tokenizer.encode_rows(rows["text"].to_pylist(), rows["ends_document"].to_pylist())
    captured = layout.captured["neox"].read_shard(layout.captured["neox"].read_commit(0))
    expected = np.concatenate([record.next_logprobs for record in engine.score_rows(ids)])
    found, _ = flatten_column(captured, "next_logprobs")
    np.testing.assert_allclose(found, expected, atol=1e-2)  # stored in float16
    assert captured.num_rows == rows.num_rows


def test_untouched_target_is_evaluated_and_trained_as_the_merged_model(run):
    _, layout, folder = run
    merged = ModelSettings(model=str(folder / "target-merged"))
    lm, tokenizer = load_scored_model(merged), load_recipe_tokenizer(merged)
    rows = [layout.held_out.read_shard(commit) for commit in layout.held_out.commits().values()]
    nats = sum(score_rows(lm, tokenizer, r, name="m", batch_tokens=512).sum() for r in rows)
    for name in ("target", "fused"):  # at a learning rate of nearly 0 both are the start weights
        scored = read_evaluation(layout, layout.evaluation.scores[name])
        assert sum(document.nats for document in scored.documents) == pytest.approx(nats, rel=1e-5)
    (fused,) = layout.runs
    published = load_file(f"{layout.store.root}/{fused.folder}/model/model.safetensors")
    start = load_file(folder / "target-merged/model.safetensors")
    assert published.keys() == start.keys()
    assert all(torch.allclose(published[key], start[key], atol=1e-6) for key in start)


def test_model_card_names_the_adapters(run):
    _, layout, folder = run
    card = (Path(layout.store.root) / layout.runs[0].folder / "model/README.md").read_text()
    assert f"with the adapter `{folder}/target-adapter`" in card
    assert f"with the adapter `{folder}/neox-adapter`" in card
