"""A run on conversations, from files to report, and what it publishes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rayfuse
from rayfuse.config.load import parse_recipe
from rayfuse.config.models import ModelSettings
from rayfuse.config.recipe import Recipe
from rayfuse.evaluate.results import read_evaluation
from rayfuse.models.chat import load_chat_format
from rayfuse.pipeline import STAGES, prepare_run, run_stages
from rayfuse.run.layout import Layout
from rayfuse.runtime.progress import report_nothing
from rayfuse.storage.chat_columns import mask_learned, read_messages
from rayfuse.storage.codec import flatten_column
from tests.chat.templates import FAMILIES, save_family
from tests.fakes import save_model

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def run(tmp_path_factory, ray_cluster) -> tuple[Recipe, Layout, Path]:
    """Finish a run whose target has no template of its own: the recipe names one."""
    folder = tmp_path_factory.mktemp("chat")
    for name, kind in (("llama-2", "llama"), ("chatml", "gpt_neox")):
        settings = save_family(name, folder / name)
        vocab_size = load_chat_format(settings).tokenizer.vocab_size
        save_model(kind, vocab_size + 4, folder / name)
    (folder / "chatml" / "chat_template.jinja").rename(folder / "own.jinja")
    records = [
        {
            "id": f"d{number}",
            "conversations": [
                {"from": "system", "value": "You add numbers."},
                {"from": "human", "value": f"What is {number} plus 4?"},
                {"from": "gpt", "value": f"It is {number + 4}."},
                {"from": "human", "value": "Are you sure?"},
                {"from": "gpt", "value": "Yes, quite." * (1 + number % 2)},
            ],
        }
        for number in range(40)
    ]
    records.append({"id": "bad", "conversations": [{"from": "human", "value": "?"}]})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "talk.jsonl").write_text(lines)
    recipe = parse_recipe(
        {
            "storage": str(folder / "storage"),
            "corpus": {
                "documents": [{"path": str(folder / "talk.jsonl"), "messages": "conversations"}],
                "max_tokens": 256,
                "shard_tokens": 400,
            },
            "target": {
                "model": str(folder / "chatml"),
                "chat_template": str(folder / "own.jinja"),
            },
            "sources": [{"name": "two", "model": str(folder / "llama-2")}],
            "fuse": {"skip_noise": False},  # random weights know nothing
            "train": {"rows_per_step": 16, "learning_rate": 1e-3},
            "evaluate": {"held_out_share": 0.3},
        }
    )
    layout = prepare_run(recipe)
    run_stages(recipe, layout, STAGES, report_nothing, lambda _: None)
    return recipe, layout, folder


def test_answers_alone_have_signals_and_labels(run):
    recipe, layout, _ = run
    assert set(layout.aligned) == {"two"}
    for shard in layout.corpus.commits():
        corpus = layout.corpus.read_shard(layout.corpus.read_commit(shard))
        aligned = layout.aligned["two"].read_shard(layout.aligned["two"].read_commit(shard))
        learned = mask_learned(corpus, flatten_column(corpus, "target_ids")[1])
        has_signal = flatten_column(aligned, "has_signal")[0]
        assert has_signal.any()
        assert not has_signal[~learned].any()
    row = next(iter(rayfuse.open_dataset(recipe.storage, view="fused")))
    batch = rayfuse.collate([row])
    labels = batch["labels"][0].numpy()
    np.testing.assert_array_equal(labels[1:] != -100, row["is_learned"][:-1])
    assert 0 < (labels != -100).sum() < len(labels) // 2


@pytest.mark.parametrize("method", ["cooccurrence", "min_edit_distance"])
def test_methods_that_store_a_map_align_answers(method, run, ray_cluster):
    recipe, layout, _ = run
    changed = rayfuse.open_run(recipe, align={"method": method})
    changed.execute("align", quiet=True)
    aligned = prepare_run(changed.recipe).aligned["two"]
    assert aligned.folder != layout.aligned["two"].folder
    for shard, commit in aligned.commits().items():
        corpus = layout.corpus.read_shard(layout.corpus.read_commit(shard))
        learned = mask_learned(corpus, flatten_column(corpus, "target_ids")[1])
        has_signal = flatten_column(aligned.read_shard(commit), "has_signal")[0]
        assert has_signal.sum() > learned.sum() / 4
        assert not has_signal[~learned].any()


def test_rejects_are_counted_by_reason(run):
    _, layout, _ = run
    stats = [commit.stats for commit in layout.corpus.commits().values()]
    stats += [commit.stats for commit in layout.held_out.commits().values()]
    assert sum(part.get("rejects: no answer", 0) for part in stats) == 1


def test_the_published_model_has_the_template_and_the_nll_of_the_table(run):
    _, layout, _ = run
    fused = next(run for run in layout.runs if run.name == "fused")
    published = Path(layout.store.root) / fused.folder / "model"
    assert (published / "chat_template.jinja").read_text() == FAMILIES["chatml"].template
    tokenizer = AutoTokenizer.from_pretrained(published)
    model = AutoModelForCausalLM.from_pretrained(published)
    own = load_chat_format(ModelSettings(model=str(published)))
    nats = num_bytes = 0.0
    for commit in layout.held_out.commits().values():
        for talk in read_messages(layout.held_out.read_shard(commit)):
            plain = [{"role": message.role, "content": message.content} for message in talk]
            ids = tokenizer.apply_chat_template(plain, tokenize=True, return_dict=False)
            encoded = own.encode_one(talk)
            assert ids == encoded.ids.tolist()
            with torch.inference_mode():
                logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(1)
            for start, stop, _ in encoded.answers.tolist():
                nats -= sum(float(logprobs[at - 1, ids[at]]) for at in range(start, stop))
            num_bytes += sum(len(m.content.encode()) for m in talk if m.role == "assistant")
    scored = read_evaluation(layout, layout.evaluation.scores["fused"]).documents
    assert sum(document.num_bytes for document in scored) == num_bytes
    found = sum(document.nats for document in scored) / num_bytes / math.log(2)
    assert found == pytest.approx(nats / num_bytes / math.log(2), rel=1e-4)
