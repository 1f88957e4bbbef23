"""Throughput of the capture stage relative to the bare model: a ratio of tokens per second.

    python benchmarks/capture.py [--data DIR] [--size 10|30|100] [--tokens N] [--json]

The baseline is a loop in one process: the same model, rows, batches and threads, forward and top-k
and nothing else, on tokens made beforehand. The pipeline runs on Ray as `rayfuse capture` does:
shards are read, tokenized, scored, encoded, written, committed and aligned. Its time is from the
first batch to the last shard's commit; starting Ray and loading the model, which take the same time
for any corpus, are printed separately. Both are repeated, interleaved; the value is the median of
the ratios. With a GPU both run on it.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from align import read_texts

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.align.task import plan_align_step
from rayfuse.capture.engines.transformers_engine import TransformersEngine
from rayfuse.capture.rows import tokenize_rows
from rayfuse.capture.stage import capture_sources
from rayfuse.config.load import parse_recipe
from rayfuse.config.recipe import Recipe
from rayfuse.corpus.stage import build_corpora
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.run.layout import Layout, plan_layout
from rayfuse.runtime.connect import join_cluster
from rayfuse.runtime.progress import report_nothing

MIN_RATIO = 0.90
SIZES = {10: (96, 4, 2), 30: (256, 6, 4), 100: (640, 10, 10)}
"""Million parameters: width, layers, attention heads, with a vocabulary of 50k."""
ROUNDS = 3


def save_model(folder: Path, tokenizer: Path, size: int) -> None:
    """Write a random Llama with a real tokenizer."""
    import shutil

    from transformers import AutoModelForCausalLM, LlamaConfig

    width, layers, heads = SIZES[size]
    config = LlamaConfig(
        vocab_size=50432,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)


def write_recipe(folder: Path, data: Path, size: int, num_tokens: int) -> Recipe:
    """Write models, text and a recipe of one source."""
    tokenizers = data / "tokenizers"
    save_model(folder / "source", tokenizers / "gpt-neox-20b", size)
    save_model(folder / "target", tokenizers / "phi-3-mini", 10)
    texts = read_texts(data, "wiki", 4 * num_tokens)
    with open(folder / "text.jsonl", "w") as out:
        for text in texts:
            out.write(json.dumps({"text": text}) + "\n")
    return parse_recipe(
        {
            "storage": str(folder / "storage"),
            "corpus": {
                "documents": str(folder / "text.jsonl"),
                "max_tokens": 512,
                "shard_tokens": max(num_tokens // 8, 1000),
            },
            "target": {"model": str(folder / "target")},
            "sources": [{"name": "source", "model": str(folder / "source"), "max_actors": 1}],
            "capture": {"batch_tokens": 4096, "chunk_positions": 512},
            "evaluate": {"documents": str(folder / "text.jsonl")},
        }
    )


def time_bare_loop(engine: TransformersEngine, shards: list[Any]) -> float:
    """Measure the tokens per second of forward and top-k alone."""
    began = time.monotonic()
    for rows in shards:
        engine.score_rows(rows)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return sum(len(row) for rows in shards for row in rows) / (time.monotonic() - began)


def time_pipeline(recipe: Recipe, layout: Layout) -> dict[str, float]:
    """Capture on Ray, and measure tokens per second and the times of its parts."""
    began = time.time()
    capture_sources(recipe, layout, report_nothing, then=plan_align_step)
    ended = time.time()
    commits = layout.captured["source"].commits().values()
    busy = sum(commit.stats["busy_seconds"] for commit in commits)
    first = min(commit.stats["began"] for commit in commits)
    folder = Path(layout.store.root, layout.captured["source"].folder, "commits")
    last = max(path.stat().st_mtime for path in folder.iterdir())
    return {
        "tokens_per_second": sum(commit.tokens for commit in commits) / (last - first),
        "busy_share": busy / (last - first),
        "start_seconds": first - began,
        "end_seconds": ended - last,
    }


def measure(data: Path, size: int, num_tokens: int) -> dict[str, Any]:
    """Time both, interleaved."""
    join_cluster()
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="rayfuse-capture-") as name:
        recipe = write_recipe(Path(name), data, size, num_tokens)
        layout = plan_layout(recipe, ALIGN_FACTS)
        build_corpora(recipe, layout, report_nothing)
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        engine = TransformersEngine(recipe.sources[0], recipe.capture)
        tokenizer = load_recipe_tokenizer(recipe.sources[0])
        commits = layout.corpus.commits().values()
        shards = [tokenize_rows(layout.corpus.read_shard(c), tokenizer) for c in commits]
        engine.score_rows(shards[0][:4])
        for _ in range(ROUNDS):
            bare = time_bare_loop(engine, shards)
            pipeline = time_pipeline(recipe, layout)
            rounds.append(pipeline | {"bare": bare, "ratio": pipeline["tokens_per_second"] / bare})
            for data_set in (*layout.captured.values(), *layout.aligned.values()):
                data_set.drop_shards(data_set.list_committed())
        num_tokens = sum(len(row) for rows in shards for row in rows)
    medians = {name: statistics.median(numbers[name] for numbers in rounds) for name in rounds[0]}
    ratios = [round(numbers["ratio"], 3) for numbers in rounds]
    return medians | {"ratios": ratios, "tokens": num_tokens, "shards": len(shards)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--size", type=int, choices=SIZES, default=10)
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments.data, arguments.size, arguments.tokens)
    result = {
        "benchmark": "capture",
        "value": round(found["ratio"], 3),
        "unit": "of the bare loop's tokens per second",
        "bar": MIN_RATIO,
        "holds": found["ratio"] >= MIN_RATIO,
        "million_parameters": arguments.size,
    } | found
    if arguments.json:
        print(json.dumps(result))
        return
    held = "holds" if result["holds"] else "MISSED"
    print(f"throughput is {found['ratio']:.1%} of the bare loop's (bar {MIN_RATIO:.0%}): {held}")
    print(f"  rounds {found['ratios']}, {found['tokens']:,} tokens in {found['shards']} shards")
    print(f"  {found['tokens_per_second']:,.0f} against {found['bare']:,.0f} tokens/s")
    print(f"  the model computes {found['busy_share']:.1%} of the time; starting takes")
    print(f"  {found['start_seconds']:.1f} s, ending {found['end_seconds']:.1f} s")


if __name__ == "__main__":
    main()
