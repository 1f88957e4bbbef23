"""The measurement of records of real models runs on any two models, and its numbers add up."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.real_models import SOURCE, TARGET
from benchmarks.real_records import ALL, DOMAINS, TOP_KS, keep_first, measure, write_tables
from rayfuse.capture.top_k import TopLogprobs
from tests.fakes import byte_level_tokenizer, save_model, save_tokenizer, sentencepiece_tokenizer

ROWS = 2


def test_entries_beyond_k_join_the_tail():
    probs = np.array([[0.4, 0.3, 0.2, 0.05], [0.97, 0.01, 0.005, 0.005]])
    record = TopLogprobs(
        top_ids=np.arange(8).reshape(2, 4),
        top_logprobs=np.log(probs).astype(np.float32),
        tail_logprobs=np.log(1 - probs.sum(axis=1)).astype(np.float32),
        next_logprobs=np.zeros(2, dtype=np.float32),
        drawn_ids=np.zeros((2, 0), dtype=np.int32),
    )
    kept = keep_first(record, 2)
    assert kept.top_ids.tolist() == [[0, 1], [4, 5]]
    np.testing.assert_allclose(np.exp(kept.tail_logprobs), [0.3, 0.02], rtol=1e-5)
    np.testing.assert_allclose(keep_first(record, 4).tail_logprobs, record.tail_logprobs)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    save_model("llama", 300, folder / TARGET)
    save_tokenizer(byte_level_tokenizer(300), folder / TARGET, bos="<|end|>", eos="<|end|>")
    save_model("llama", 400, folder / SOURCE)
    save_tokenizer(sentencepiece_tokenizer(400), folder / SOURCE, bos="<s>", eos="</s>")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for domain in DOMAINS:
        path = tmp_path / "data/corpus" / domain / "valid.jsonl.gz"
        path.parent.mkdir(parents=True)
        with gzip.open(path, "wt") as lines:
            for number in range(3):
                text = f"{domain} {number}: the committee's 1,234 members met in Zürich. " * 9
                lines.write(json.dumps({"text": text}) + "\n")
    return tmp_path / "data"


def test_both_models_are_captured_and_aligned_with_each_other(models, data):
    result = measure(models, data, ROWS, row_tokens=96)
    assert set(result["records"]) == {TARGET, SOURCE}
    assert set(result["alignments"]) == {f"{TARGET} to {SOURCE}", f"{SOURCE} to {TARGET}"}
    for domains in result["records"].values():
        assert list(domains) == [*DOMAINS, ALL]
        assert domains[ALL]["tokens"] == sum(domains[domain]["tokens"] for domain in DOMAINS)
        for found in domains.values():
            tails = [found[str(top_k)]["tail"] for top_k in TOP_KS]
            sizes = [found[str(top_k)]["bytes"] for top_k in TOP_KS]
            assert 1 > tails[0] > tails[1] > tails[2] > tails[3] > 0
            assert sizes == sorted(sizes)
            assert 0 < found["tokens"] <= ROWS * 96 * len(DOMAINS)
    for domains in result["alignments"].values():
        total = sum(domains[domain]["positions"] for domain in DOMAINS)
        signals = sum(domains[d]["signal"] * domains[d]["positions"] for d in DOMAINS)
        assert domains[ALL]["positions"] == total
        assert domains[ALL]["signal"] == pytest.approx(signals / total)
        for found in domains.values():
            assert 0 < found["one_to_one"] <= found["signal"] <= found["signal_inside"] <= 1
            assert -1e-3 < found["lost"] < 1
    tables = write_tables(result).splitlines()
    assert len(tables) == 2 * (2 + 2 * (len(DOMAINS) + 1)) + 1
