"""A run whose source is another tool's store: the model's weights are nowhere."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import rayfuse
from benchmarks.synthetic import make_corpus
from rayfuse.align.after_capture import capture_and_align
from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.config.base import UserError
from rayfuse.imports.capture import (
    check_unchanged,
    describe_import,
    import_sources,
    open_source_store,
)
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.models.tokenizer import load_tokenizer
from rayfuse.pipeline import STAGES, is_stage_done, prepare_run
from rayfuse.run.budget import Limits, open_budget
from rayfuse.run.layout import Layout, plan_layout
from rayfuse.runtime.progress import ProgressEvent, StoppedEarly
from tests.imports.stores import write_distillkit
from tests.small_run import write_recipe


def write_imported_run(folder: Path) -> Path:
    """Write a store of a source, its texts as documents, and a recipe that uses both."""
    path = write_recipe(folder)
    lines = (folder / "docs.jsonl").read_text().splitlines()
    texts = [f"{number}. {json.loads(line)['text']}"[:160] for number, line in enumerate(lines)]
    tokenizer = load_tokenizer(str(folder / "neox"))
    lm = AutoModelForCausalLM.from_pretrained(folder / "neox").eval()
    rows = [[tokenizer.start_id, *row.tolist()] for row in tokenizer.encode(texts)]
    with torch.inference_mode():
        logits = [lm(torch.tensor([row])).logits[0, :, : tokenizer.vocab_size] for row in rows]
    scored = [(row, part.numpy()) for row, part in zip(rows, logits, strict=True)]
    write_distillkit(folder / "logits", scored)
    for file in ("config.json", "model.safetensors"):
        (folder / "neox" / file).unlink()
    arguments = [str(folder / name) for name in ("logits", "texts.jsonl", "neox")]
    rayfuse.import_store(*arguments)
    recipe = yaml.safe_load(path.read_text())
    recipe["corpus"] |= {"documents": arguments[1], "max_tokens": 256}
    recipe["sources"] = [{"name": "neox", "model": arguments[2], "captured_from": arguments[0]}]
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.ray
def test_an_imported_source_is_aligned_fused_and_trained_on(tmp_path, ray_cluster):
    path = write_imported_run(tmp_path)
    run = rayfuse.open_run(path, train={"num_workers": 1})
    values = run.execute(quiet=True)
    assert values["stages"] == dict.fromkeys(STAGES, True)
    assert values["neox"]["rejects"] == 0
    layout = plan_layout(run.recipe, ALIGN_FACTS)
    stats = [commit.stats for commit in layout.aligned["neox"].commits().values()]
    # Each text ends without a record of EOS.
    documents = sum(layout.corpus.read_shard(c)["ends_document"].to_pylist().count(True)
                    for c in layout.corpus.commits().values())  # fmt: skip
    assert sum(stat["unmatched: source: not recorded"] for stat in stats) == documents
    assert sum(stat["with_signal"] for stat in stats) > 10 * documents
    assert set(layout.evaluation.scores) == {"target", "clm", "fused"}
    metrics = layout.store.read(f"{layout.runs[0].folder}/metrics.jsonl").decode().splitlines()
    assert all(json.loads(line)["fusion_loss"] > 0 for line in metrics)
    card = layout.store.read(f"{layout.runs[0].folder}/model/README.md").decode()
    assert f"- Source neox: `{tmp_path}/neox`, imported from `{tmp_path}/logits`" in card
    shutil.rmtree(tmp_path / "logits")  # once it is imported, it is not needed
    assert all(is_stage_done(stage, prepare_run(run.recipe)) for stage in STAGES)
    assert "capture neox" not in str(run.plan())


def write_corpus(path: Path, layout: Layout, num_shards: int) -> None:
    """Write the corpus of an imported run, all documents, without a cluster."""
    tokenizer = load_recipe_tokenizer(rayfuse.open_run(path).recipe.target)
    lines = (path.parent / "texts.jsonl").read_text().splitlines()
    rows = make_corpus([json.loads(line)["text"] for line in lines], tokenizer, max_tokens=256)
    layout.corpus.claim({})
    size = -(-rows.num_rows // num_shards)
    for shard in range(num_shards):
        layout.corpus.write_shard(shard, rows.slice(shard * size, size), tokens=1)
    layout.corpus.finish(num_shards)


def test_an_import_stops_after_a_shard_and_resumes(tmp_path):
    path = write_imported_run(tmp_path)
    recipe = rayfuse.open_run(path).recipe
    layout = prepare_run(recipe)
    write_corpus(path, layout, 3)
    captured = layout.captured["neox"]
    done: list[int] = []

    def note_done(event: ProgressEvent) -> None:
        done.extend([event.done] * bool(event.total))

    with pytest.raises(StoppedEarly):
        capture_and_align(recipe, layout, note_done, should_stop=lambda: len(done) >= 1)
    assert done == [1]
    assert captured.list_committed() == {0}
    with pytest.raises(StoppedEarly):  # the shard of the first call is no work of this one
        import_sources(recipe, layout, note_done, should_stop=lambda: len(done) >= 3)
    assert done == [1, 1, 2]
    with pytest.raises(StoppedEarly):  # before anything is opened
        import_sources(recipe, layout, note_done, should_stop=lambda: True)
    assert not captured.is_complete()
    import_sources(recipe, layout, note_done)
    assert done == [1, 1, 2, 1, 2, 3]
    assert captured.is_complete()


def test_a_source_that_is_imported_needs_no_price(tmp_path):
    recipe = rayfuse.open_run(write_imported_run(tmp_path), train={"gpus_per_worker": 0}).recipe
    layout = prepare_run(recipe)
    budget = open_budget(recipe, layout, STAGES, Limits(max_dollars=1.0))
    names = {"train clm", "train fused", "evaluate clm", "evaluate fused", "evaluate target"}
    assert set(budget.prices) == names


def test_a_store_that_is_missing_is_refused_before_a_cluster_is_joined(tmp_path):
    path = write_imported_run(tmp_path)
    shutil.rmtree(tmp_path / "logits")
    with pytest.raises(UserError, match=r"sources\.neox\.captured_from is .* does not exist"):
        prepare_run(rayfuse.open_run(path).recipe)


def test_another_store_in_the_same_folder_is_refused_also_after_the_import(tmp_path):
    recipe = rayfuse.open_run(write_imported_run(tmp_path)).recipe
    layout = prepare_run(recipe)
    source, captured = recipe.sources[0], layout.captured["neox"]
    captured.claim({"imported": describe_import(source, open_source_store(source))})
    captured.finish(0)
    assert captured.is_complete()
    prepare_run(recipe)
    renamed = source.model_copy(update={"revision": "v2"})
    with pytest.raises(UserError, match=r"since rows of it were imported \(revision\); remove"):
        check_unchanged(renamed, open_source_store(source), captured)
    file = tmp_path / "logits/data_0.parquet"
    content = bytearray(file.read_bytes())
    content[100] ^= 1  # sampled again: files of the same sizes
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"has changed since rows .* \(identity\); remove"):
        prepare_run(recipe)
    for path in (tmp_path / "logits").iterdir():
        path.unlink()
    prepare_run(recipe)  # it is not needed any more


def test_settings_of_an_import_that_do_not_fit_are_refused(tmp_path):
    path = write_recipe(tmp_path)
    source = yaml.safe_load(path.read_text())["sources"][0]
    with pytest.raises(UserError, match="captured_aligned is 0 without captured_from"):
        rayfuse.open_run(path, sources=[source | {"captured_aligned": 0}])
    imported = source | {"captured_from": "logits"}
    with pytest.raises(UserError, match=r"have no draws, but capture\.signal is sampled"):
        rayfuse.open_run(path, sources=[imported], capture={"signal": "sampled"})
    with pytest.raises(UserError, match="adapter is 'a', but the source is imported"):
        rayfuse.open_run(path, sources=[imported | {"adapter": "a"}])
