"""Target tokens a second of the training feed: read, zip three sources, fuse, pack, lay out.

    python benchmarks/loader.py [--data DIR] [--tokens N] [--top-k N] [--json]

Real text and tokenizers of four families; distributions are synthetic and aligned as
`rayfuse align` does. Shards are on a local disk, in the page cache; every byte is checked against
its sha256. The rate is per second of CPU time of all threads.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
from align import DOMAINS, read_texts
from synthetic import make_captured, make_corpus

from rayfuse.align.method import build_alignment
from rayfuse.align.shard import align_shard
from rayfuse.config.fuse import FuseSettings
from rayfuse.fuse.reader import ShardReader
from rayfuse.models.tokenizer import load_tokenizer
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.store import LocalStore
from rayfuse.train.batches import Packing, StepPlan, iterate_steps

TARGET, SOURCES = "open-llama-3b", ("gpt-neox-20b", "gpt2", "phi-3-mini")
MIN_RATE = 1_000_000
MAX_TOKENS, NUM_SHARDS, RUNS = 2048, 8, 5


def write_shards(data: Path, folder: Path, num_tokens: int, top_k: int) -> dict[str, DataSet]:
    """Write a corpus and the aligned rows of three sources; return the data sets by name."""
    models = {name: load_tokenizer(str(data / "tokenizers" / name)) for name in (TARGET, *SOURCES)}
    store = LocalStore(str(folder))
    sets = {name: DataSet(store, name, "", "f") for name in ("corpus", *SOURCES)}
    for data_set in sets.values():
        data_set.claim({})
    share = 5 * num_tokens // len(DOMAINS)
    texts = [text for domain in DOMAINS for text in read_texts(data, domain, share)]
    random = np.random.default_rng(0)
    order = random.permutation(len(texts))
    for shard in range(NUM_SHARDS):
        mine = [texts[index] for index in order[shard::NUM_SHARDS]]
        corpus = make_corpus(mine, models[TARGET], max_tokens=MAX_TOKENS)
        lengths = np.diff(corpus["target_ids"].combine_chunks().offsets.to_numpy())
        enough = int(np.searchsorted(np.cumsum(lengths), num_tokens // NUM_SHARDS)) + 1
        corpus = corpus.slice(0, enough).combine_chunks()
        tokens = int(lengths[:enough].sum())
        sets["corpus"].write_shard(shard, corpus, tokens=tokens)
        for name in SOURCES:
            captured = make_captured(corpus, models[name], top_k=top_k, seed=shard)
            alignment = build_alignment(models[name], models[TARGET])
            sets[name].write_shard(
                shard, align_shard(corpus, captured, alignment)[0], tokens=tokens
            )
    for data_set in sets.values():
        data_set.finish(NUM_SHARDS)
    return sets


def measure(sets: dict[str, DataSet], fuse: FuseSettings, token_bytes: np.ndarray) -> float:
    """Time one pass over all shards: tokens per second of CPU time."""
    aligned = {name: sets[name] for name in SOURCES}
    began = time.process_time()
    reader = ShardReader(sets["corpus"], aligned, fuse, token_bytes)
    plan = StepPlan(seed=0, epochs=1, rows_per_step=128)
    steps = iterate_steps(reader, Packing(MAX_TOKENS, 1, True), plan, rank=0, num_workers=1)
    tokens = sum(len(batch.positions) for step in steps for batch in step.batches)
    return tokens / (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared/data")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    target = load_tokenizer(str(options.data / "tokenizers" / TARGET))
    with tempfile.TemporaryDirectory() as folder:
        sets = write_shards(options.data, Path(folder), options.tokens, options.top_k)
        kinds = {
            "min_ce by row": FuseSettings(),
            "min_ce by span": FuseSettings(unit="span"),
            "avg_ce by row": FuseSettings(method="avg_ce"),
            "fixed_share": FuseSettings(method="fixed_share"),
        }
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(RUNS):
            for kind, fuse in kinds.items():
                rates[kind].append(measure(sets, fuse, target.count_bytes()))
    medians = {kind: round(statistics.median(values)) for kind, values in rates.items()}
    value = medians["min_ce by row"]
    result = {
        "value": value,
        "unit": "target tokens/s/core",
        "bar": MIN_RATE,
        "holds": value >= MIN_RATE,
        "rates": medians,
    }
    if options.json:
        print(json.dumps(result))
        return
    for kind, rate in medians.items():
        print(f"{kind:16} {rate:>12,} tokens/s/core")


if __name__ == "__main__":
    main()
