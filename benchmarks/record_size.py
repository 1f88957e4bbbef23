"""Bytes per token of captured records on disk, and the information lost by encoding them.

    python benchmarks/record_size.py [--data DIR] [--tokens N] [--steps N] [--json]

The distributions are those of two trained models on held-out text: a published model of 260
thousand parameters with a vocabulary of 512, and a two-layer model with one of 50,277, trained here
for a few minutes. The size is that of the entire Parquet file, all columns, for a shard as `rayfuse
capture` writes it. The loss is KL(model || stored) in nats, over the top k and the tail.
Rates are of one core: records to file bytes, and file bytes to probabilities.
"""

import argparse
import io
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from align import DOMAINS, read_texts
from transformers import AutoModelForCausalLM, LlamaConfig

from rayfuse.capture.engines.base import Failure
from rayfuse.capture.engines.transformers_engine import TransformersEngine
from rayfuse.capture.rows import build_captured, tokenize_rows
from rayfuse.capture.top_k import TopLogprobs
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import ModelSettings
from rayfuse.corpus.documents import Document
from rayfuse.corpus.shards import build_rows
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.models.tokenizer import TextTokenizer
from rayfuse.storage.codec import decode_probs, flatten_column
from rayfuse.storage.parquet import encode_table

MAX_BYTES = {10: 30, 16: 45}
MAX_NATS = 1e-4
SIGNALS = (
    *({"signal": "top_k", "top_k": top_k} for top_k in (10, 16, 32, 64)),
    {"signal": "sampled", "draws": 12},
    {"signal": "top_k_and_sampled_tail", "top_k": 16, "draws": 8},
)
ROW_TOKENS = 512
RUNS = 5


def train_model(folder: Path, data: Path, num_steps: int) -> None:
    """Train a small Llama with a vocabulary of 50k on all domains, and save it."""
    shutil.copytree(data / "tokenizers/gpt-neox-20b", folder)
    tokenizer = load_recipe_tokenizer(ModelSettings(model=str(folder)))
    texts = [text for domain in DOMAINS for text in read_texts(data, domain, 700_000)]
    rows = tokenizer.encode_rows(texts, [True] * len(texts))
    order = np.random.default_rng(0).permutation(len(rows))
    tokens = np.concatenate([rows[index] for index in order])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=50_432,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=ROW_TOKENS,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batches = tokens[: len(tokens) // 1024 * 1024].reshape(-1, 8, 128)
    for step in range(num_steps):
        batch = torch.from_numpy(batches[step % len(batches)].astype(np.int64))
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def read_unseen(data: Path, tokenizer: TextTokenizer, num_tokens: int) -> pa.Table:
    """Build corpus rows from the validation text of all domains."""
    import gzip

    documents: list[Document] = []
    for domain in DOMAINS:
        with gzip.open(data / f"corpus/{domain}/valid.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in list(lines)[:40]:
                document = json.loads(line)
                documents.append(Document(document["id"], domain, document["text"][:3000]))
    corpus = build_rows(documents, tokenizer, [tokenizer], max_tokens=ROW_TOKENS)
    lengths = np.diff(flatten_column(corpus, "target_ids")[1])
    step = max(int(lengths.sum()) // num_tokens, 1)  # some of every domain
    return corpus.take(np.arange(0, len(lengths), step))


def measure_record(
    source: ModelSettings, corpus: pa.Table, settings: CaptureSettings
) -> dict[str, Any]:
    """Capture rows with a model, and measure the size and loss of their record."""
    engine = TransformersEngine(source, settings)
    tokenizer = load_recipe_tokenizer(source)
    rows = tokenize_rows(corpus, tokenizer)
    records = engine.score_rows(rows)
    kept = [record for record in records if not isinstance(record, Failure)]
    num_tokens = sum(len(row) for row in rows)
    write_seconds, read_seconds = [], []
    for _ in range(RUNS):
        began = time.perf_counter()
        table = build_captured(corpus, rows, records, tokenizer.eos_id)[0]
        data = encode_table(table, "0" * 12, 0)
        written = time.perf_counter()
        stored = pq.read_table(io.BytesIO(data), use_threads=False, page_checksum_verification=True)
        probs, ids, tails = _read_head(stored, num_tokens)
        write_seconds.append(written - began)
        read_seconds.append(time.perf_counter() - written)
    return {
        "signal": settings.signal,
        "top_k": settings.kept_entries,
        "draws": settings.num_draws,
        "bytes_per_token": round(len(data) / num_tokens, 2),
        "nats_lost": _measure_lost_nats(kept, probs, ids, tails),
        "written_per_second": round(num_tokens / statistics.median(write_seconds)),
        "read_per_second": round(num_tokens / statistics.median(read_seconds)),
        "columns": _count_columns(data, num_tokens),
    }


def _read_head(table: pa.Table, num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    flat = flatten_column(table, "top_ids")[0]
    ids = flat.reshape(num_tokens, len(flat) // num_tokens)
    tails = flatten_column(table, "tail_logprobs")[0]
    return decode_probs(flatten_column(table, "top_logprobs")[0], ids, tails), ids, tails


def _measure_lost_nats(
    records: list[TopLogprobs], probs: np.ndarray, ids: np.ndarray, tails: np.ndarray
) -> float:
    """Compute the mean KL divergence of the decoded record from the model's distribution."""
    exact = np.concatenate([record.top_logprobs for record in records]).astype(np.float64)
    tail = np.concatenate([record.tail_logprobs for record in records]).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        head = np.where(ids >= 0, np.exp(exact) * (exact - np.log(probs.astype(np.float64))), 0.0)
    return float((head.sum(axis=1) + np.exp(tail) * (tail - tails.astype(np.float64))).mean())


def _count_columns(data: bytes, num_tokens: int) -> dict[str, float]:
    """Compute the bytes per token of each column."""
    file = pq.ParquetFile(io.BytesIO(data)).metadata
    sizes: dict[str, int] = {}
    for group in range(file.num_row_groups):
        for column in range(file.num_columns):
            chunk = file.row_group(group).column(column)
            name = chunk.path_in_schema.partition(".")[0]
            sizes[name] = sizes.get(name, 0) + chunk.total_compressed_size
    return {name: round(size / num_tokens, 2) for name, size in sizes.items()}


def measure(data: Path, num_tokens: int, num_steps: int) -> list[dict[str, Any]]:
    """Measure every signal on both models."""
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="rayfuse-record-") as name:
        trained = Path(name) / "trained-50k"
        train_model(trained, data, num_steps)
        for folder in (data / "models/stories260k", trained):
            source = ModelSettings(model=str(folder))
            corpus = read_unseen(data, load_recipe_tokenizer(source), num_tokens)
            for signal in SIGNALS:
                settings = CaptureSettings.model_validate(signal)
                found = measure_record(source, corpus, settings)
                results.append({"model": folder.name} | found)
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared/data")
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = measure(arguments.data, arguments.tokens, arguments.steps)
    heads = [result for result in results if result["signal"] == "top_k"]
    barred = [result for result in heads if result["top_k"] in MAX_BYTES]
    sizes = {
        top_k: max(result["bytes_per_token"] for result in barred if result["top_k"] == top_k)
        for top_k in MAX_BYTES
    }
    nats = max(result["nats_lost"] for result in heads)
    holds = nats <= MAX_NATS and all(sizes[top_k] <= limit for top_k, limit in MAX_BYTES.items())
    if arguments.json:
        print(
            json.dumps(
                {
                    "benchmark": "record_size",
                    "value": sizes[10],
                    "unit": "bytes per token at top-10",
                    "bar": MAX_BYTES[10],
                    "holds": holds,
                    "nats_lost": nats,
                    "results": results,
                }
            )
        )
        return
    print("| model | signal | k | draws | bytes per token | nats lost | written/s | read/s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for result in results:
        print(
            f"| {result['model']} | {result['signal']} | {result['top_k']} | {result['draws']} "
            f"| {result['bytes_per_token']:.1f} | {result['nats_lost']:.1e} "
            f"| {result['written_per_second']:,} | {result['read_per_second']:,} |"
        )
    for result in results:
        if result["top_k"] == 16:
            print(f"{result['model']}, {result['signal']}: {result['columns']}")
    print("holds" if holds else "MISSED", f"(bars {MAX_BYTES}, {MAX_NATS} nats)")


if __name__ == "__main__":
    main()
