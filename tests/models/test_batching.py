"""Rows longer than the context are scored in windows, each position once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfuse.capture.engines.transformers_engine import TransformersEngine
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import ModelSettings
from rayfuse.evaluate.bits_per_byte import load_scored_model, score_rows
from rayfuse.models.batching import cut_windows
from rayfuse.models.files import load_recipe_tokenizer
from tests.fakes import SAMPLE, byte_level_tokenizer, save_tokenizer
from tests.models.tiny_models import tiny_config


@settings(deadline=None)
@given(st.integers(0, 300), st.one_of(st.none(), st.integers(2, 60)))
def test_windows_score_each_position_once_together_with_the_next_token(length, context):
    windows = cut_windows(length, context)
    scored = [
        position
        for tokens, kept in windows
        for position in range(tokens.start + kept.start, tokens.start + kept.stop)
    ]
    assert scored == list(range(length))
    for tokens, kept in windows:
        assert tokens.stop - tokens.start <= (context or length)
        assert tokens.start + kept.stop + 1 <= tokens.stop or tokens.stop == length
    # Every window but the first gives its positions half the context before them.
    assert all(kept.start >= (context or 0) // 2 - 1 for _, kept in windows[1:])


@pytest.fixture
def model(tmp_path) -> ModelSettings:
    """Create a GPT-2 with a context of 64 tokens."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(tiny_config("gpt2", 300, context=64)).save_pretrained(tmp_path)
    save_tokenizer(byte_level_tokenizer(300), tmp_path, bos="<|end|>", eos="<|end|>")
    return ModelSettings(model=str(tmp_path))


@pytest.mark.parametrize("signal", ["top_k", "top_k_and_sampled_tail"])
def test_captured_records_of_a_long_row_equal_those_of_its_windows(model, signal):
    engine = TransformersEngine(model, CaptureSettings(signal=signal, top_k=4))
    row = load_recipe_tokenizer(model).encode_rows(["".join(SAMPLE)], [True])[0][:150]
    record, short = engine.score_rows([row, row[:50]])
    assert len(record.next_logprobs) == 150
    alone = [engine.score_rows([row[start : start + 64]])[0] for start in (0, 32, 64, 96)]
    np.testing.assert_allclose(record.next_logprobs[:63], alone[0].next_logprobs[:63], atol=1e-5)
    np.testing.assert_allclose(
        record.next_logprobs[63:95], alone[1].next_logprobs[31:63], atol=1e-5
    )
    np.testing.assert_allclose(record.next_logprobs[127:], alone[3].next_logprobs[31:], atol=1e-5)
    assert record.next_logprobs[-1] == 0
    assert (record.next_logprobs[:-1] < 0).all()
    assert len(record.top_ids) == 150
    assert len(short.top_ids) == 50


def test_nll_of_a_long_row_equals_the_captured_log_probabilities(model):
    import pyarrow as pa

    lm, tokenizer = load_scored_model(model), load_recipe_tokenizer(model)
    rows = pa.table({"row_id": ["a", "b"], "text": [SAMPLE[0], "".join(SAMPLE)]})
    nats = score_rows(lm, tokenizer, rows, name="m", batch_tokens=128, context_tokens=64)
    assert np.isfinite(nats).all()
    short = rows.slice(0, 1)
    alone = score_rows(lm, tokenizer, short, name="m", batch_tokens=128)
    assert nats[0] == pytest.approx(alone[0], abs=1e-4)
    tokens = tokenizer.encode_rows(rows["text"].to_pylist(), [False, False])[1]
    engine = TransformersEngine(model, CaptureSettings())
    assert nats[1] == pytest.approx(-engine.score_rows([tokens])[0].next_logprobs.sum(), rel=1e-4)
