"""Draws from the tail are unbiased, reproducible, and stored with their counts."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rayfuse.align.method import Alignment, load_method
from rayfuse.align.shard import align_shard
from rayfuse.align.token_spans import list_token_bytes
from rayfuse.capture.engines.transformers_engine import TransformersEngine
from rayfuse.capture.rows import build_captured, tokenize_rows
from rayfuse.capture.sampling import count_draws, draw_ids, make_noise
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import ModelSettings
from rayfuse.corpus.documents import Document
from rayfuse.corpus.shards import build_rows
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.storage.codec import decode_probs, flatten_column
from tests.capture.test_top_k import make_source
from tests.fakes import SAMPLE


def test_stratified_draws_are_unbiased_with_less_variance_than_independent_ones():
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(1, 50, generator=generator).pow(4)
    probs /= probs.sum()
    rounds, num_draws = 40_000, 12
    noise = torch.rand(rounds, num_draws, generator=generator)
    ids = draw_ids(probs.log().expand(rounds, -1), noise)
    assert (ids.diff(dim=1) >= 0).all()
    shares = torch.nn.functional.one_hot(ids, 50).double().mean(1)
    variance = probs[0] * (1 - probs[0]) / num_draws  # of independent draws
    assert ((shares.mean(0) - probs[0]).abs() < 4 * (variance / rounds).sqrt()).all()
    values = torch.randn(50, 20, generator=generator, dtype=torch.double)
    of_one_draw = (probs.double() @ values.square() - (probs.double() @ values).square())[0]
    assert ((shares @ values).var(0) < of_one_draw / num_draws).all()


def test_a_token_without_probability_is_never_drawn():
    logits = torch.full((3, 9), -torch.inf)
    logits[0, [2, 5]] = 0.0
    logits[1, 8] = -300.0  # underflows unless the largest is subtracted first
    for noise in (0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))):
        first, second, third = draw_ids(logits, torch.full((3, 4), float(noise))).tolist()
        assert set(first) == {2, 5}
        assert (second, third) == ([8] * 4, [-1] * 4)


def test_counting_keeps_each_token_once():
    ids, counts = count_draws(np.array([[3, 3, 7], [1, 2, 4], [-1, -1, -1], [0, 5, 5]]))
    assert ids.tolist() == [[3, 7, -1], [1, 2, 4], [-1, -1, -1], [0, 5, -1]]
    assert counts.tolist() == [[2, 1, 0], [1, 1, 1], [0, 0, 0], [1, 2, 0]]


def test_noise_depends_on_the_row_and_the_model_alone():
    rows = [np.array([5, 6, 7]), np.array([5, 6]), np.array([5, 6, 7])]
    noise = make_noise(rows, 2, "model").tolist()
    assert noise[:3] == noise[5:] == make_noise(rows[:1], 2, "model").tolist()
    assert noise[:2] != noise[3:5]
    assert noise[:3] != make_noise(rows[:1], 2, "another").tolist()
    assert all(0 <= number < 1 for numbers in noise for number in numbers)


def capture(source: ModelSettings, signal: str, batch_tokens: int = 64, **settings: int):
    """Capture the sample: its corpus, its records and the captured table."""
    tokenizer = load_recipe_tokenizer(source)
    documents = [Document(f"d{i}", "", text) for i, text in enumerate(SAMPLE)]
    corpus = build_rows(documents, tokenizer, [tokenizer], max_tokens=512)
    rows = tokenize_rows(corpus, tokenizer)
    settings = {"signal": signal, "batch_tokens": batch_tokens, **settings}
    engine = TransformersEngine(source, CaptureSettings.model_validate(settings))
    records = engine.score_rows(rows)
    table, rejects = build_captured(corpus, rows, records, tokenizer.eos_id)
    assert not rejects
    return corpus, records, table


@pytest.mark.parametrize("signal", ["sampled", "top_k_and_sampled_tail"])
def test_a_row_draws_the_same_in_any_batch(signal, tmp_path):
    source = make_source("llama", tmp_path)
    _, alone, _ = capture(source, signal, batch_tokens=1, chunk_positions=5)
    _, together, _ = capture(source, signal, batch_tokens=10_000)
    same = [
        (one.drawn_ids == other.drawn_ids).all(axis=1)
        for one, other in zip(alone, together, strict=True)
    ]
    # The shape of a batch changes the rounding of logits, and with it now and then a draw.
    assert np.concatenate(same).mean() > 0.99


def distributions(table, num_tokens: int, vocab_size: int) -> np.ndarray:
    """Decode each aligned position's distribution to a dense array, without the tail."""
    top_ids = flatten_column(table, "top_ids")[0].reshape(num_tokens, -1)
    tails = flatten_column(table, "tail_logprobs")[0]
    probs = decode_probs(flatten_column(table, "top_logprobs")[0], top_ids, tails)
    dense = np.zeros((num_tokens, vocab_size + 1))
    np.put_along_axis(dense, top_ids.astype(int), probs.astype(float), axis=1)
    return dense[:, :-1]  # ids of -1 wrote into the last


def softmax_of(source: ModelSettings, row: np.ndarray, vocab_size: int) -> np.ndarray:
    """Compute a model's distribution at each position of a row with transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source.model).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(row)[None].long()).logits[0].double()
    return logits[:, :vocab_size].softmax(1).numpy()


@pytest.mark.parametrize("signal", ["sampled", "top_k_and_sampled_tail"])
def test_aligned_draws_are_the_sources_distribution_on_average(signal, tmp_path, monkeypatch):
    source = make_source("llama", tmp_path)
    tokenizer = load_recipe_tokenizer(source)
    spelled = list_token_bytes(tokenizer)
    maps = np.stack([np.arange(tokenizer.vocab_size)] * 3).astype(np.int32)
    maps = np.pad(maps, ((0, 0), (0, 1)), constant_values=-1)
    alignment = Alignment(spelled, spelled, maps, load_method("bytes"))
    corpus, records, _ = capture(source, signal)
    num_tokens = sum(len(record.next_logprobs) for record in records)
    exact = np.concatenate(
        [softmax_of(source, row, tokenizer.vocab_size) for row in tokenize_rows(corpus, tokenizer)]
    )
    mean = np.zeros_like(exact)
    rounds, draws = 60, 24
    for seed in range(rounds):
        monkeypatch.setattr(
            "rayfuse.capture.engines.transformers_engine.make_noise",
            lambda rows, num, salt, seed=seed: make_noise(rows, num, f"{salt}{seed}"),
        )
        _, _, table = capture(source, signal, top_k=6, draws=draws)
        aligned, sums = align_shard(corpus, table, alignment)
        mean += distributions(aligned, num_tokens, tokenizer.vocab_size) / rounds
    has_signal = flatten_column(aligned, "has_signal")[0]
    assert sums["tail_mass"] < 1e-3
    errors = (mean - exact)[has_signal]
    # Of independent draws; stratified ones vary less.
    variances = (exact * (1 - exact) / draws / rounds)[has_signal]
    assert np.square(errors).mean() < 1.1 * variances.mean()
    bias = errors.mean(axis=0)
    assert (np.abs(bias) < 5 * np.sqrt(variances.mean(axis=0) / len(errors))).all()


def test_sampled_records_hold_no_head_and_top_k_records_no_draws(tmp_path: Path):
    source = make_source("gpt2", tmp_path)
    widths = {
        signal: [
            len(flatten_column(table, name)[0]) / len(flatten_column(table, "token_ids")[0])
            for name in ("top_ids", "top_logprobs", "draw_ids", "draw_counts")
        ]
        for signal in ("top_k", "sampled", "top_k_and_sampled_tail")
        for _, _, table in [capture(source, signal, top_k=6, draws=4)]
    }
    assert widths == {
        "top_k": [6, 6, 0, 0],
        "sampled": [0, 0, 4, 4],
        "top_k_and_sampled_tail": [6, 6, 4, 4],
    }
