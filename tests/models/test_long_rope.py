"""A row is scored as if it were alone: rows on both sides of LongRoPE's original context."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config

from rayfuse.capture.engines.transformers_engine import TransformersEngine
from rayfuse.capture.top_k import TopLogprobs
from rayfuse.config.base import UserError
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import ModelSettings, SourceSettings
from rayfuse.evaluate.bits_per_byte import score_rows
from rayfuse.models.batching import batch_by_tokens
from rayfuse.models.causal_lm import load_causal_lm
from rayfuse.models.files import check_model
from rayfuse.models.tokenizer import load_tokenizer
from rayfuse.train.batches import Packing, build_micro_batches
from tests.fakes import SAMPLE, byte_level_tokenizer, save_model, save_tokenizer
from tests.train.test_batches import random_rows

ORIGINAL, CONTEXT = 24, 96


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ModelSettings:
    """Save a Phi-3 with short and long factors that differ much."""
    folder = tmp_path_factory.mktemp("phi3")
    torch.manual_seed(1)
    config = Phi3Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=320,
        pad_token_id=0,
        max_position_embeddings=CONTEXT,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
        },
        initializer_range=0.5,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(byte_level_tokenizer(300), folder, bos="<|end|>", eos="<|end|>")
    return ModelSettings(model=str(folder), dtype="float32")


def make_rows() -> list[np.ndarray]:
    numbers = np.random.default_rng(0)
    lengths = [10, 23, 24, 25, 40, 60, 12, 30]
    return [numbers.integers(1, 300, length).astype(np.int32) for length in lengths]


def test_captured_rows_do_not_depend_on_the_rows_beside_them(model):
    def score(batch_tokens: int) -> list[TopLogprobs]:
        engine = TransformersEngine(model, CaptureSettings(batch_tokens=batch_tokens, top_k=8))
        results = engine.score_rows(make_rows())
        return [result for result in results if isinstance(result, TopLogprobs)]

    for together, alone in zip(score(10_000), score(1), strict=True):
        np.testing.assert_array_equal(together.top_ids, alone.top_ids)
        np.testing.assert_allclose(together.next_logprobs, alone.next_logprobs, atol=1e-4)


def test_scores_do_not_depend_on_the_rows_beside_them(model):
    lm, tokenizer = load_causal_lm(model, "cpu"), load_tokenizer(model.model)
    texts = [SAMPLE[i % 4][: 15 + 12 * i] for i in range(5)]
    rows = pa.table({"row_id": [str(i) for i in range(5)], "text": texts})
    lengths = [len(ids) for ids in tokenizer.encode_rows(texts, [False] * 5)]
    assert min(lengths) <= ORIGINAL < max(lengths)
    together, alone = (
        score_rows(lm, tokenizer, rows, name="m", batch_tokens=batch_tokens)
        for batch_tokens in (10_000, 1)
    )
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_engine_that_does_not_choose_by_row_is_refused_for_longer_rows(model):
    source = SourceSettings(name="s", model=model.model, backend="vllm")
    check_model(source, ORIGINAL, role="source s")
    with pytest.raises(UserError, match=rf"use backend transformers, or max_tokens <= {ORIGINAL}"):
        check_model(source, ORIGINAL + 1, role="source s")
    plain = SourceSettings(name="s", model=model.model)
    check_model(plain, CONTEXT, role="source s")


def test_boundaries_are_read_from_the_config(model):
    assert load_causal_lm(model, "cpu").length_boundaries == (ORIGINAL,)


@pytest.mark.parametrize("boundaries", [(), (24,), (12, 30)])
def test_no_batch_has_rows_on_both_sides_of_a_boundary(boundaries):
    lengths = [len(row) for row in make_rows()]
    batches = list(batch_by_tokens(lengths, 200, boundaries))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        sides = {sum(lengths[row] > boundary for boundary in boundaries) for row in batch}
        assert len(sides) == 1
    assert all(lengths[first[0]] >= lengths[second[0]] for first, second in pairwise(batches))


@pytest.mark.parametrize("is_packed", [True, False])
def test_no_micro_batch_has_rows_on_both_sides_of_a_boundary(is_packed):
    rows = random_rows(12)
    boundary = int(np.median(rows.lengths))
    batches = build_micro_batches(rows, Packing(64, 2, is_packed, (boundary,)))
    plain = build_micro_batches(rows, Packing(64, 2, is_packed))
    assert sum(len(batch.positions) for batch in batches) == sum(len(b.positions) for b in plain)
    for batch in batches:
        # The last token of a row has no next one, so a gap in the positions separates two rows.
        ends = np.flatnonzero(np.diff(batch.positions) != 1)
        lengths = np.diff([-1, *ends, len(batch.positions) - 1]) + 1
        assert len(set(lengths > boundary)) == 1


def test_model_without_long_rope_has_no_boundaries(tmp_path: Path):
    save_model("llama", 320, tmp_path)
    assert load_causal_lm(ModelSettings(model=str(tmp_path)), "cpu").length_boundaries == ()


def test_generated_text_does_not_depend_on_the_prompts_beside_it(model):
    """Also where prompts are on two sides of the original context, and all results beyond it."""
    from lm_eval.api.instance import Instance

    from rayfuse.evaluate.lm_eval_model import TextLM

    lm = load_causal_lm(model, "cpu")
    tokenizer = load_tokenizer(model.model)
    text = tokenizer.encode([SAMPLE[0] * 3])[0]
    prompts = [
        b"".join(tokenizer.token_bytes[i] or b"" for i in text[:size].tolist()).decode()
        for size in (ORIGINAL - 6, ORIGINAL + 6, ORIGINAL - 2)
    ]
    asked = {"max_gen_toks": 12}
    requests = [Instance("generate_until", {}, (prompt, asked), 0) for prompt in prompts]

    def generate(batch_tokens: int) -> list[str]:
        return TextLM(lm, tokenizer, batch_tokens=batch_tokens).generate_until(requests)

    assert generate(10_000) == generate(1)
