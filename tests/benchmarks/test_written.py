"""Text that sources write: prompts of the corpus, continued by the best source of each row."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from benchmarks.fusion.training import PACKING, WrittenBatch, train_lm
from benchmarks.fusion.written import (
    PROMPT_TOKENS,
    continue_texts,
    draw_prompts,
    iterate_mixed_steps,
)
from rayfuse.config.fuse import FuseSettings
from rayfuse.config.models import ModelSettings
from rayfuse.config.train import TrainSettings
from rayfuse.corpus.documents import Document
from rayfuse.corpus.shards import build_rows
from rayfuse.demo.shipped import FOLDER as MODELS
from rayfuse.fuse.reader import FusedRows, ShardReader
from rayfuse.models.causal_lm import load_causal_lm
from rayfuse.models.tokenizer import load_tokenizer
from rayfuse.storage.codec import TopK
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.store import LocalStore
from rayfuse.train.batches import StepPlan, build_micro_batches

TEXT = "It was late in the year, and nobody on the island expected a ship. " * 6
FAMILIES = ("gpt2-target", "llama-code", "mpt-arithmetic", "neox-prose")


@pytest.fixture(scope="module")
def corpus() -> pa.Table:
    tokenizer = load_tokenizer(str(MODELS / FAMILIES[0]))
    documents = [Document(str(number), "prose", f"{number}. {TEXT}") for number in range(6)]
    return build_rows(documents, tokenizer, [tokenizer], max_tokens=64)


def test_a_prompt_starts_at_a_word_of_its_row_and_goes_to_the_source_that_predicts_it_best(corpus):
    nats = np.random.default_rng(0).gamma(2.0, 1.0, (3, corpus.num_rows))
    prompts = draw_prompts(corpus, nats, 50, seed=1)
    assert prompts == draw_prompts(corpus, nats, 50, seed=1) != draw_prompts(corpus, nats, 50, 2)
    texts = corpus["text"].to_pylist()
    for prompt in prompts:
        rows = [row for row, text in enumerate(texts) if text.endswith(prompt.text)]
        assert prompt.writer in {int(nats[:, row].argmin()) for row in rows}
        assert any(
            len(texts[row]) == len(prompt.text) or texts[row][-len(prompt.text) - 1] == " "
            for row in rows
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_begins_with_its_prompt_and_depends_on_the_seed_alone(family):
    folder = MODELS / family
    lm = load_causal_lm(ModelSettings(model=str(folder), dtype="float32"), "cpu")
    tokenizer = load_tokenizer(str(folder))
    prompts = [TEXT, "short", TEXT[30:]]
    texts = continue_texts(lm, tokenizer, prompts, max_tokens=48, seed=3)
    assert texts == continue_texts(lm, tokenizer, prompts, max_tokens=48, seed=3)
    assert texts != continue_texts(lm, tokenizer, prompts, max_tokens=48, seed=4)
    assert texts[1] == ""
    for prompt, text in zip(prompts[::2], texts[::2], strict=True):
        ids = tokenizer.encode_rows([prompt], [False])[0][:PROMPT_TOKENS]
        begun = b"".join(tokenizer.token_bytes[token] or b"" for token in ids.tolist()).decode()
        assert text.startswith(begun.removeprefix(" " * tokenizer.adds_prefix_space))
        assert prompt.startswith(begun.removeprefix(" " * tokenizer.adds_prefix_space))


def test_half_of_each_step_is_written_text_whose_tokens_are_no_labels_for_fusion(corpus, tmp_path):
    tokenizer = load_tokenizer(str(MODELS / FAMILIES[0]))
    readers = []
    for name, rows in (("corpus", corpus), ("written", corpus.slice(0, 3))):
        data = DataSet(LocalStore(str(tmp_path)), name, "", "x")
        data.write_shard(0, rows, tokens=1)
        readers.append(ShardReader(data, {}, FuseSettings(), tokenizer.count_bytes()))
    plan = StepPlan(seed=0, epochs=2, rows_per_step=4)
    steps = list(iterate_mixed_steps(*readers, plan, learns_labels=False))
    assert len(steps) == 2 * -(-corpus.num_rows // 2)
    for batches in steps:
        kinds = [isinstance(batch, WrittenBatch) for batch in batches]
        assert sum(kinds) == 1 == len(kinds) - 1
    plain = list(iterate_mixed_steps(*readers, plan, learns_labels=True))
    assert not any(isinstance(batch, WrittenBatch) for batches in plain for batch in batches)


def test_a_written_batch_is_learned_from_its_distributions_alone(corpus):
    tokens = np.array(corpus["target_ids"][0].as_py(), dtype=np.int32)
    certain = TopK(
        np.full((len(tokens), 1), 5, np.int32),
        np.ones((len(tokens), 1), np.float32),
        np.zeros(len(tokens), np.float32),
    )
    selected = np.zeros(len(tokens), np.int16)
    rows = FusedRows(tokens, np.array([len(tokens)]), certain, selected)
    (batch,) = build_micro_batches(rows, PACKING)
    found = {}
    for kind, weight in ((type(batch), 0.0), (WrittenBatch, 0.5), (type(batch), 0.5)):
        copied = load_causal_lm(
            ModelSettings(model=str(MODELS / FAMILIES[0]), dtype="float32"), "cpu"
        )
        settings = TrainSettings(clm_weight=weight, learning_rate=0.01)
        train_lm(copied, [[kind(**vars(batch))]], settings, num_steps=1, source_names=("a",))
        found[kind, weight] = next(copied.model.parameters()).detach().clone()
    assert torch.equal(found[type(batch), 0.0], found[WrittenBatch, 0.5])
    assert not torch.equal(found[type(batch), 0.5], found[WrittenBatch, 0.5])
