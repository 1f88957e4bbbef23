"""Faults that capture must survive, numbered as in the fault model: those that need no cluster."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.capture.engines.base import EngineMemoryError, Failure
from rayfuse.capture.engines.memory import RETRY_SECONDS
from rayfuse.capture.engines.transformers_engine import TransformersEngine
from rayfuse.capture.rows import NOT_FINITE
from rayfuse.capture.shard import ShardCapturer, ShardStats
from rayfuse.capture.stats import StatsAccumulator
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import ModelSettings
from rayfuse.corpus.documents import Document
from rayfuse.corpus.shards import build_rows
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.models.tokenizer import load_tokenizer
from rayfuse.run.layout import plan_layout
from rayfuse.storage.codec import flatten_column
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.retry import NUM_RETRIES
from rayfuse.storage.store import LocalStore, open_store
from rayfuse.storage.verify import repair_data_set, verify_data_set
from tests.fakes import SAMPLE, byte_level_tokenizer, save_model, save_tokenizer
from tests.run.test_segmentation import MODELS, write_recipe
from tests.s3 import Rule

VOCAB, PADDED = 300, 352


@pytest.fixture
def model(tmp_path) -> ModelSettings:
    """Save a small Llama with a head wider than its tokenizer."""
    folder = tmp_path / "model"
    save_model("llama", PADDED, folder)
    save_tokenizer(byte_level_tokenizer(VOCAB), folder, bos="<|end|>", eos="<|end|>")
    return ModelSettings(model=str(folder))


@pytest.fixture
def corpus(tmp_path, model) -> DataSet:
    """Write a corpus of one shard."""
    tokenizer = load_recipe_tokenizer(model)
    documents = [Document(f"d{i}", "", text * (1 + i)) for i, text in enumerate(SAMPLE)]
    data = DataSet(open_store(str(tmp_path / "storage")), "corpus", "", "0")
    data.claim({})
    data.write_shard(0, build_rows(documents, tokenizer, [tokenizer], max_tokens=128), tokens=1)
    data.finish(1)
    return data


def make_capturer(model: ModelSettings, corpus: DataSet, name: str = "a") -> ShardCapturer:
    engine = TransformersEngine(model, CaptureSettings(top_k=4))
    captured = DataSet(corpus.store, "captured", name, "1")
    captured.claim({})
    return ShardCapturer(engine, model, corpus, captured)


def capture_and_stop_before_the_commit(model: ModelSettings, corpus: DataSet, pipe) -> None:
    """Score a shard, stop the process as if its node hung, and commit once it is continued."""
    torch.set_num_threads(1)
    capturer = make_capturer(model, corpus)
    score = capturer.engine.score_rows

    def score_and_stop(rows):
        records = score(rows)
        pipe.send("scored")
        os.kill(os.getpid(), signal.SIGSTOP)
        return records

    capturer.engine.score_rows = score_and_stop
    pipe.send(asdict(capturer.capture(0)))


def test_fault_6_a_worker_that_hung_cannot_replace_a_shard_and_leaves_no_file(model, corpus):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    zombie = context.Process(
        target=capture_and_stop_before_the_commit, args=(model, corpus, theirs), daemon=True
    )
    zombie.start()
    assert ours.recv() == "scored"
    capturer = make_capturer(model, corpus)
    numbers = capturer.capture(0)
    assert numbers.is_ours
    content = Path(corpus.store.root, capturer.captured.folder)
    before = sorted((path.name, path.read_bytes()) for path in (content / "data").iterdir())
    os.kill(zombie.pid, signal.SIGCONT)
    late = ShardStats(**ours.recv())
    zombie.join(60)
    assert not late.is_ours
    assert late.worker == numbers.worker
    assert sorted((path.name, path.read_bytes()) for path in (content / "data").iterdir()) == before
    assert not verify_data_set(capturer.captured).orphans


def test_fault_7_retried_storage_requests_are_counted(model, corpus, s3_root, s3_proxy):
    store = open_store(s3_root)
    for name in ("commits/00000.json", corpus.read_commit(0).file):
        store.write(f"{corpus.folder}/{name}", corpus.store.read(f"{corpus.folder}/{name}"))
    capturer = make_capturer(model, replace(corpus, store=store))
    before = NUM_RETRIES.count
    s3_proxy.rules += [Rule("slowdown", match="/data/", times=3), Rule("500", match="/commits/")]
    numbers = capturer.capture(0)
    assert numbers.is_ours
    assert numbers.storage_retries == before + 4


def test_fault_14_an_error_names_the_full_disk_and_no_partial_shard_is_committed(
    small_disk, model, corpus
):
    store = LocalStore(str(small_disk))
    capturer = make_capturer(model, replace(corpus, store=store))
    capturer.corpus = corpus
    ballast = small_disk / "ballast"
    with open(ballast, "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(1024))
    with pytest.raises(OSError) as error:
        capturer.capture(0)
    assert str(small_disk) in str(error.value)
    assert "No space left on device, writing" in str(error.value)
    assert not capturer.captured.list_committed()
    data = small_disk / capturer.captured.folder / "data"
    assert not data.exists() or not list(data.iterdir())
    ballast.unlink()
    assert capturer.capture(0).is_ours
    assert not verify_data_set(capturer.captured).corrupt


def test_fault_15_a_batch_beyond_the_memory_is_halved_until_it_fits(model, tmp_path):
    """Use a real limit of the process' memory: the logits of all positions together exceed it."""
    program = tmp_path / "score.py"
    program.write_text(
        f"""
import resource, sys, logging
logging.basicConfig(level=logging.WARNING, format="%(message)s")
import torch; torch.set_num_threads(1)
from rayfuse.capture.engines.base import Failure
from rayfuse.capture.engines.transformers_engine import TransformersEngine
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import ModelSettings
from rayfuse.models.files import load_recipe_tokenizer
import numpy as np
model = ModelSettings(model={model.model!r})
engine = TransformersEngine(
    model, CaptureSettings(top_k=4, batch_tokens=2_000_000, chunk_positions=2_000_000)
)
row = load_recipe_tokenizer(model).encode_rows([{"".join(SAMPLE)!r}], [True])[0][:100]
alone = engine.score_rows([row])[0]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000,) * 2)
records = engine.score_rows([row] * 3_000)
assert len(records) == 3_000
assert not any(isinstance(record, Failure) for record in records)
assert all(np.allclose(r.next_logprobs, alone.next_logprobs, atol=1e-4) for r in records)
print("batch", engine.batch_tokens)
"""
    )
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "out of memory with 300000 tokens" in done.stderr
    assert "lower capture.batch_tokens (2000000)" in done.stderr
    assert int(done.stdout.split()[-1]) <= 150_000


def limit_memory(engine: TransformersEngine, find_limit: Callable[[], int]) -> None:
    """Make batches beyond a number of tokens run out of memory."""
    score_batch = engine.batches.score_batch

    def limited(rows):
        if sum(len(row) for row in rows) > find_limit():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return score_batch(rows)

    engine.batches.score_batch = limited


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """Record the pauses before retries, and skip them."""
    slept: list[float] = []
    monkeypatch.setattr("rayfuse.capture.engines.memory.time.sleep", slept.append)
    return slept


def test_fault_15_a_row_beyond_the_memory_is_rejected_and_its_neighbours_are_not(model, pauses):
    engine = TransformersEngine(model, CaptureSettings(top_k=4, batch_tokens=1000))
    limit_memory(engine, lambda: 60)
    rows = [np.arange(n) + 1 for n in (50, 90, 30, 40)]
    for _ in range(2):
        records = engine.score_rows(rows)
        assert records[1] == Failure("out of memory")
        assert [len(records[i].next_logprobs) for i in (0, 2, 3)] == [50, 30, 40]
        assert engine.batch_tokens < 1000
        assert pauses == list(RETRY_SECONDS)  # once: later rows of this length are not retried


def test_fault_15_a_temporary_shortage_rejects_no_row(model, pauses):
    engine = TransformersEngine(model, CaptureSettings(top_k=4, batch_tokens=1000))
    rows = [np.arange(n) + 1 for n in (50, 90, 30, 40)]
    alone = engine.score_rows(rows)
    limit_memory(engine, lambda: 35 if len(pauses) < 2 else 1000)
    records = engine.score_rows(rows)
    assert pauses == list(RETRY_SECONDS[:2])
    for record, expected in zip(records, alone, strict=True):
        np.testing.assert_allclose(record.next_logprobs, expected.next_logprobs, atol=1e-5)
    assert engine.batch_tokens == 1000


def test_fault_15_a_lasting_shortage_commits_nothing_and_stops_the_run(model, corpus, pauses):
    capturer = make_capturer(model, corpus)
    limit_memory(capturer.engine, lambda: 3)
    with pytest.raises(
        EngineMemoryError, match=r"no memory for \d+ tokens, 31 s after .*same comm"
    ):
        capturer.capture(0)
    assert not capturer.captured.list_committed()
    capturer = make_capturer(model, corpus)
    assert capturer.capture(0).rejects == 0


def test_fault_15_many_batches_beyond_the_memory_are_all_cut_to_what_fits(model):
    engine = TransformersEngine(model, CaptureSettings(top_k=4, batch_tokens=100))
    score_batch = engine.batches.score_batch

    def limited(rows):
        if sum(len(row) for row in rows) > 60:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling it")
        return score_batch(rows)

    engine.batches.score_batch = limited
    records = engine.score_rows([np.arange(10) + 1] * 80)
    assert not any(isinstance(record, Failure) for record in records)
    assert engine.batch_tokens == 50


def test_fault_17_ids_that_the_tokenizer_lacks_are_never_kept_or_drawn(model):
    settings = {"signal": "top_k_and_sampled_tail", "top_k": 100, "draws": 100}
    engine = TransformersEngine(model, CaptureSettings.model_validate(settings))
    with torch.no_grad():
        engine.lm.head.weight[VOCAB:] *= 100  # padding rows may hold any weights
    tokenizer = load_recipe_tokenizer(model)
    assert tokenizer.vocab_size < PADDED
    for record in engine.score_rows(tokenizer.encode_rows(SAMPLE, [True] * len(SAMPLE))):
        assert record.top_ids.max() < tokenizer.vocab_size
        assert record.drawn_ids.max() < tokenizer.vocab_size
        mass = np.exp(record.top_logprobs).sum(axis=1) + np.exp(record.tail_logprobs)
        np.testing.assert_allclose(mass, 1, atol=1e-5)


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, vocab in MODELS.items():
        save_model("llama", PADDED, tmp_path / name)
        save_tokenizer(byte_level_tokenizer(vocab), tmp_path / name, bos="<|end|>", eos="<|end|>")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "some text"}))
    return tmp_path


def test_fault_18_a_changed_tokenizer_gets_new_folders(folder, tmp_path):
    recipe = write_recipe(folder, tmp_path / "storage", "a", "b")
    before = plan_layout(recipe, ALIGN_FACTS)
    path = folder / "a" / "tokenizer.json"
    content = json.loads(path.read_text())
    merges = content["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]
    path.write_text(json.dumps(content))
    load_tokenizer.cache_clear()
    after = plan_layout(recipe, ALIGN_FACTS)
    assert after.captured["a"].folder != before.captured["a"].folder
    assert after.aligned["a"].folder != before.aligned["a"].folder
    assert after.runs[0].folder != before.runs[0].folder


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_fault_19_only_the_row_with_values_that_are_not_finite_is_rejected(value, model, corpus):
    capturer, poisoned = make_capturer(model, corpus), make_capturer(model, corpus, "b")
    assert capturer.capture(0).rejects == 0
    rows = corpus.read_shard(corpus.read_commit(0))
    tokens = load_recipe_tokenizer(model).encode_rows(
        rows["text"].to_pylist(), rows["ends_document"].to_pylist()
    )
    seen = [set(row.tolist()) for row in tokens]
    alone = [ids - set.union(*seen[:i], *seen[i + 1 :]) for i, ids in enumerate(seen)]
    bad, poison = next((i, min(ids)) for i, ids in enumerate(alone) if ids)
    with torch.no_grad():
        poisoned.engine.lm.model.get_input_embeddings().weight[poison] = value
    numbers = poisoned.capture(0)
    assert numbers.rejects == 1
    rejects = Path(corpus.store.root, poisoned.captured.folder, "rejects/00000.jsonl").read_text()
    (line,) = rejects.splitlines()
    assert json.loads(line) == {
        "name": rows["row_id"][bad].as_py(),
        "reason": NOT_FINITE,
    }
    sound, other = (
        one.captured.read_shard(one.captured.read_commit(0)) for one in (capturer, poisoned)
    )
    good = [i for i in range(len(tokens)) if i != bad]
    assert other.take(good).equals(sound.take(good))
    assert np.diff(flatten_column(other, "token_ids")[1])[bad] == 0


def test_fault_19_too_many_rejects_stop_the_run():
    total = StatsAccumulator(source="s", num_shards=9, done_before=0, batch_tokens=1)
    numbers = ShardStats(0, 1000, 200, 2, True, "w", 1.0, 1.0, 1, 0)
    total.add(numbers)
    total.check_rejects(0.01)
    total.add(replace(numbers, shard=1, rejects=3))
    with pytest.raises(ValueError, match=r"5 of 400 rows .* capture.max_rejected_share \(1.00%\)"):
        total.check_rejects(0.01)


TOKENIZERS = (
    *("gpt2", "gpt-neox-20b", "mistral-7b", "open-llama-3b", "phi-3-mini", "t5-small"),
    *("bert-base-uncased", "stories260k"),
)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_fault_23_special_tokens_spelled_in_a_text_are_tokenized_as_text(name, shared_data):
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / name), None, False)
    content = json.loads((shared_data / f"tokenizers/{name}/tokenizer.json").read_text())
    markers = [token["content"] for token in content["added_tokens"] if token["special"]]
    assert markers
    texts = [f"before {marker} after{marker}{marker}" for marker in markers] + markers
    rows = tokenizer.encode_rows(texts, [True] * len(texts))
    special = {token["id"] for token in content["added_tokens"] if token["special"]}
    start = int(tokenizer.start_id is not None)
    for text, row in zip(texts, rows, strict=True):
        inner = row[start : len(row) - (tokenizer.eos_id is not None)].tolist()
        unknown = {i for i in special if tokenizer.token_names[i] in ("<unk>", "[UNK]")}
        assert not (set(inner) & special) - unknown, text


def test_fault_31_no_decision_depends_on_file_times(model, corpus):
    capturer = make_capturer(model, corpus)
    capturer.capture(0)
    captured = capturer.captured
    captured.finish(1)
    folder = Path(corpus.store.root, captured.folder)
    leftover = folder / "data/00000-0123456789ab.parquet"
    in_flight = folder / "data/00001-0123456789ab.parquet"
    for path in (leftover, in_flight):
        path.write_bytes(b"x")
    for when in (0.0, time.time() + 10 * 365 * 86_400):  # 1970, and ten years on
        for path in folder.rglob("*"):
            os.utime(path, (when, when))
        found = verify_data_set(captured)
        assert not found.corrupt
        assert found.orphans == [f"{captured.folder}/data/{leftover.name}"]
        assert captured.is_complete()
        assert make_capturer(model, corpus).capture(0).worker == capturer.worker
    repair_data_set(captured, verify_data_set(captured), {})
    assert in_flight.exists()
    assert not leftover.exists()
