"""The fusion study's own parts compute the same as rayfuse's."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from benchmarks.fusion.cut_tokenizers import cut_tokenizer
from benchmarks.fusion.full import place_full_source
from benchmarks.fusion.intervals import Interval, compare_groups, find_multiple, spread_over_seeds
from benchmarks.fusion.published import teach_current_token
from benchmarks.fusion.records import keep_fewer
from rayfuse.align.method import build_alignment
from rayfuse.align.shard import align_shard
from rayfuse.capture.rows import build_captured, tokenize_rows
from rayfuse.capture.top_k import TopLogprobs, keep_top_k
from rayfuse.corpus.documents import Document
from rayfuse.corpus.shards import build_rows
from rayfuse.demo.specs import ModelSpec
from rayfuse.demo.tiny_models import build_model
from rayfuse.models.causal_lm import CausalLM, split_head
from rayfuse.models.tokenizer import TextTokenizer, load_tokenizer
from rayfuse.storage.codec import decode_probs, flatten_column

TEXTS = (
    "The cat sat on the mat, and 1,024 more cats sat on 17 mats.\n",
    "def f(x):\n        return x  # caf\u00e9 \u2014 na\u00efve\n",
    "In the beginning there was nothing; then there were tokenizers.",
)


@pytest.fixture(scope="module")
def tokenizers(shared_data, tmp_path_factory) -> tuple[TextTokenizer, TextTokenizer]:
    """A SentencePiece target and a byte-level source with few tokens in common."""
    found = []
    for name in ("mistral-7b", "gpt-neox-20b"):
        folder = tmp_path_factory.mktemp(name)
        cut_tokenizer(shared_data / "tokenizers" / name, folder, TEXTS, 400)
        found.append(load_tokenizer(str(folder)))
    return found[0], found[1]


@pytest.fixture(scope="module")
def corpus(tokenizers) -> pa.Table:
    documents = [Document(str(number), "d", text) for number, text in enumerate(TEXTS)]
    return build_rows(documents, tokenizers[0], tokenizers, max_tokens=64)


@pytest.fixture(scope="module")
def source_lm(tokenizers) -> CausalLM:
    """A confident source: 255 tokens have nearly all of its mass."""
    size = tokenizers[1].vocab_size
    spec = ModelSpec("source", "llama", "byte_level", size, size, 32, 1, (), steps=0)
    lm = split_head(build_model(spec, tokenizers[1], 0), name="source")
    with torch.no_grad():
        lm.head.weight *= 12
    return lm


def capture(lm: CausalLM, tokenizer: TextTokenizer, corpus: pa.Table, top_k: int):
    rows = tokenize_rows(corpus, tokenizer)
    known = torch.from_numpy(tokenizer.known_ids())
    records: list[TopLogprobs] = []
    for row in rows:
        hidden = lm.hidden_states(torch.from_numpy(row.astype(np.int64))[None])[0]
        following = torch.from_numpy(np.append(row[1:], -1).astype(np.int64))
        noise = torch.zeros(len(row), 0)
        kept = keep_top_k(hidden, lm, known, following, noise, top_k=top_k, chunk_positions=32)
        records += kept.split_rows([len(row)])
    return rows, records


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox-20b", "open-llama-3b", "mistral-7b"])
def test_cut_tokenizer_spells_every_text(shared_data, tmp_path, name):
    cut_tokenizer(shared_data / "tokenizers" / name, tmp_path / name, TEXTS, 500)
    tokenizer = load_tokenizer(str(tmp_path / name))
    assert tokenizer.vocab_size == 500
    for text, ids in zip(TEXTS, tokenizer.encode(list(TEXTS)), strict=True):
        spelled = b"".join(tokenizer.token_bytes[token] or b"" for token in ids.tolist())
        assert spelled.decode().removeprefix(" " * tokenizer.adds_prefix_space) == text


def test_cut_tokenizer_is_the_real_one_before_its_later_merges(shared_data, tmp_path):
    cut_tokenizer(shared_data / "tokenizers" / "gpt2", tmp_path, TEXTS, 500)
    real = load_tokenizer(str(shared_data / "tokenizers" / "gpt2"))
    first = {*real.token_names[:499], "<|endoftext|>"}
    assert set(load_tokenizer(str(tmp_path)).token_names) == first


def test_a_smaller_top_k_equals_a_capture_with_it(source_lm, tokenizers, corpus):
    _, many = capture(source_lm, tokenizers[1], corpus, 64)
    _, few = capture(source_lm, tokenizers[1], corpus, 10)
    for large, small in zip(many, few, strict=True):
        kept = keep_fewer(large, 10)
        assert isinstance(kept, TopLogprobs)
        np.testing.assert_array_equal(kept.top_ids, small.top_ids)
        np.testing.assert_array_equal(kept.top_logprobs, small.top_logprobs)
        np.testing.assert_allclose(kept.tail_logprobs, small.tail_logprobs, atol=1e-5)


def test_full_distributions_are_the_records_of_all_tokens(source_lm, tokenizers, corpus):
    target, source = tokenizers
    alignment = build_alignment(source, target)
    rows, records = capture(source_lm, source, corpus, 255)
    captured, _ = build_captured(corpus, rows, records, source.eos_id)
    aligned, _ = align_shard(corpus, captured, alignment)
    has_signal, offsets = flatten_column(aligned, "has_signal")
    tails = flatten_column(aligned, "tail_logprobs")[0]
    ids = flatten_column(aligned, "top_ids")[0].reshape(len(tails), -1)
    codes = flatten_column(aligned, "top_logprobs")[0]
    probs = decode_probs(codes, ids, tails)
    full = place_full_source(source_lm, alignment, corpus, captured)
    np.testing.assert_array_equal(full.source_at >= 0, has_signal)
    for row in range(corpus.num_rows):
        at = offsets[row] + np.flatnonzero(has_signal[offsets[row] : offsets[row + 1]])
        dense = full.read(at, row).numpy()
        np.testing.assert_allclose(dense.sum(axis=1), 1, atol=1e-5)
        stored = np.zeros_like(dense)
        entry = ids[at] >= 0
        stored[np.nonzero(entry)[0], ids[at][entry]] = probs[at][entry]
        stored[:, -1] = np.exp(tails[at].astype(np.float32))
        # Codes are exact to a few percent of each entry; 255 tokens lack 1e-3 of the mass.
        assert np.abs(dense - stored).sum(axis=1).mean() < 0.02
        assert np.abs(dense - stored).max() < 0.05


def test_the_published_fault_teaches_the_current_token(source_lm, tokenizers, corpus):
    target, source = tokenizers
    alignment = build_alignment(source, target, "exact")
    rows, records = capture(source_lm, source, corpus, 10)
    captured, _ = build_captured(corpus, rows, records, source.eos_id)
    aligned, _ = align_shard(corpus, captured, alignment)
    faulty = teach_current_token(corpus, aligned)
    assert faulty.schema == aligned.schema
    before, after = (flatten_column(table, "has_signal")[0] for table in (aligned, faulty))
    token_ids = flatten_column(corpus, "target_ids")[0]
    ids = flatten_column(faulty, "top_ids")[0].reshape(len(token_ids), -1)
    tails = flatten_column(faulty, "tail_logprobs")[0]
    probs = decode_probs(flatten_column(faulty, "top_logprobs")[0], ids, tails)
    assert after.all() and 0 < before.sum() < len(before)
    np.testing.assert_array_equal(ids[~before, 0], token_ids[~before])
    np.testing.assert_allclose(probs[~before, 0], 1, atol=1e-6)
    old_ids = flatten_column(aligned, "top_ids")[0].reshape(ids.shape)
    np.testing.assert_array_equal(ids[before], old_ids[before])


DOCUMENTS = [(str(number), "ab"[number % 2], 100) for number in range(20)]


def test_an_interval_is_no_narrower_than_either_of_its_parts():
    random = np.random.default_rng(0)
    base = random.normal(100, 5, (1, 20)).repeat(3, axis=0)
    shift = np.array([[1.0], [1.2], [1.4]]) + random.normal(0, 0.1, (1, 20))
    found = compare_groups(base + shift, base, DOCUMENTS)["all"]
    means = shift.mean(axis=1) / np.log(2) / 100
    np.testing.assert_allclose(found.value, means.mean())
    student = 4.303 * means.std(ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(spread_over_seeds(means.tolist()), student)
    assert found.high - found.value > student and found.value - found.low > student
    assert found.outcome == "worse"
    alone = compare_groups((base + shift)[:1], base[:1], DOCUMENTS)["all"]
    assert 0 < alone.high - alone.low < found.high - found.low


def test_the_multiple_of_tokens_is_exact_for_a_loss_linear_in_log_tokens():
    per_document = np.full((3, 20), 100.0)
    clm = {times: per_document - 10 * np.log2(times) for times in (1, 2, 4)}
    multiple, is_interpolated = find_multiple(per_document - 10 * np.log2(3), clm, DOCUMENTS)
    np.testing.assert_allclose([multiple.value, multiple.low, multiple.high], 3, rtol=1e-6)
    assert is_interpolated
    multiple, is_interpolated = find_multiple(per_document - 10 * np.log2(6), clm, DOCUMENTS)
    np.testing.assert_allclose(multiple.value, 6, rtol=1e-6)
    assert not is_interpolated


def test_an_outcome_is_claimed_only_outside_zero():
    assert Interval(-1, -2, 0.1).outcome == "unclear"
    assert Interval(-1, -2, -0.1).outcome == "better"
    assert Interval(1, 0.1, 2).outcome == "worse"
