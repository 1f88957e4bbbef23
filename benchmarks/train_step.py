"""Time of a fused training step over that of a plain language-modelling step.

    python -m benchmarks.train_step [--tokens N] [--size NAME] [--json]

Both steps run in one process, interleaved, through DeepSpeed engines of equal settings on the same
packed rows: AdamW, ZeRO 2, float32 on a CPU, bfloat16 on a GPU. Fused rows carry top-16
distributions of three sources, random ones: what is in them does not change the work. The plain
step is the run that `rayfuse train` calls `clm`: the same chunked loss, of the text alone. Models
of 10 to 100 million weights with vocabularies of 32 and 128 thousand.
"""

import argparse
import json
import os
import socket
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.random_models import build_random_lm
from benchmarks.timing import Timings, time_interleaved
from rayfuse.config.train import TrainSettings
from rayfuse.fuse.reader import FusedRows
from rayfuse.fuse.rules import make_empty
from rayfuse.storage.codec import TopK
from rayfuse.train.batches import MicroBatch, Packing, Step, build_micro_batches
from rayfuse.train.deepspeed_engine import build_engine
from rayfuse.train.loop import Objective, train_steps
from rayfuse.train.model import FusionModel

MAX_RATIO = 1.05
SIZES = {
    "10M, 32k": (32_000, 192, 6),
    "35M, 128k": (128_256, 256, 4),
    "60M, 32k": (32_000, 640, 8),
    "100M, 128k": (128_256, 576, 8),
}
ENTRIES, RUNS, NUM_STEPS = 16, 5, 1000
PACKING = Packing(sequence_tokens=1024, sequences=1, is_packed=True)
KINDS = {"fused": 0.5, "clm": 1.0}
"""Lambda of both kinds of step."""
SOURCES = ("a", "b", "c")


@dataclass(frozen=True)
class StepShape:
    """The rows of a step, and how they are packed."""

    tokens: int
    row_tokens: int = 256
    packing: Packing = PACKING


@dataclass(frozen=True)
class StepTimes:
    """The seconds of both kinds of step, and the batches and the last loss of the fused one."""

    timings: Timings
    batches: list[MicroBatch]
    loss: float

    @property
    def num_positions(self) -> int:
        """The next tokens learned in a step."""
        return sum(len(batch.positions) for batch in self.batches)


def make_rows(shape: StepShape, vocab: int, *, is_fused: bool) -> FusedRows:
    """Make rows of equal length, with random distributions or none."""
    random = np.random.default_rng(0)
    lengths = np.full(shape.tokens // shape.row_tokens, shape.row_tokens)
    total = int(lengths.sum())
    token_ids = random.integers(0, vocab, total).astype(np.int32)
    if not is_fused:
        selected = np.full(total, -1, dtype=np.int16)
        return FusedRows(token_ids, lengths, make_empty(total), selected)
    part = vocab // ENTRIES
    ids = random.integers(0, part, (total, ENTRIES)) + np.arange(ENTRIES) * part
    probs = random.dirichlet(np.ones(ENTRIES + 1), total).astype(np.float32)
    has_signal = random.random(total) < 0.85
    selected = np.where(has_signal, random.integers(len(SOURCES), size=total), -1)
    top = TopK(ids.astype(np.int32), probs[:, :-1], probs[:, -1])
    return FusedRows(token_ids, lengths, top, selected)


def describe_llama(vocab: int, width: int, layers: int) -> dict[str, Any]:
    """Describe a small Llama with tied embeddings, as in its config.json."""
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "tie_word_embeddings": True,
    }


def time_steps(engine: Any, shape: StepShape, *, runs: int) -> StepTimes:
    """Time fused and plain steps on one engine: equal memory, equal caches.

    Args:
        engine: The DeepSpeed engine, or one with the same methods.
        shape: The rows of a step.
        runs: Steps of each kind that are timed.
    """
    vocab = engine.module.head_loss.weight.shape[0]
    steps = {
        kind: Step(
            build_micro_batches(make_rows(shape, vocab, is_fused=kind == "fused"), shape.packing),
            "",
        )
        for kind in KINDS
    }

    losses: dict[str, float | None] = {}

    def take_step(kind: str) -> None:
        train_steps(
            engine,
            iter([steps[kind]]),
            Objective(KINDS[kind], 1.0, NUM_STEPS, SOURCES),
            first_step=0,
            num_workers=1,
            after_step=lambda metrics: losses.update({kind: metrics.loss}),
        )

    parts = {kind: lambda kind=kind: take_step(kind) for kind in KINDS}
    timings = time_interleaved(parts, torch.device(engine.device), rounds=runs)
    loss = losses["fused"]
    if loss is None:
        raise FloatingPointError("the loss of a fused step is not finite")
    return StepTimes(timings, steps["fused"].batches, loss)


def measure(size: tuple[int, int, int], tokens: int) -> dict[str, Any]:
    """Return the seconds of both steps, and their ratio."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    settings = TrainSettings(learning_rate=1e-5)
    lm = build_random_lm(describe_llama(*size), device, dtype)
    lm.model.train()
    engine = build_engine(
        FusionModel(lm, settings, num_sources=len(SOURCES)),
        settings,
        num_steps=NUM_STEPS,
        num_workers=1,
        device=device.type,
    )
    timings = time_steps(engine, StepShape(tokens), runs=RUNS).timings
    ratios = timings.ratios("fused", "clm")
    return {
        "ratio": round(timings.ratio("fused", "clm"), 4),
        "min": round(min(ratios), 4),
        "max": round(max(ratios), 4),
        "clm_seconds": round(timings.median("clm"), 3),
        "tokens_per_second": round(tokens / timings.median("fused")),
    }


def start_process_group(device: torch.device) -> None:
    """Start the process group of one worker, which DeepSpeed needs."""
    if torch.distributed.is_initialized():
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument(
        "--size", choices=SIZES, action="append", help="only this one; may be repeated"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(2)
    start_process_group(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    sizes: dict[str, dict[str, Any]] = {}
    for name in options.size or SIZES:
        sizes[name] = measure(SIZES[name], options.tokens)
        print(f"{name}: {sizes[name]}", file=sys.stderr)  # the largest takes minutes
    torch.distributed.destroy_process_group()
    value = max(size["ratio"] for size in sizes.values())
    result = {
        "value": value,
        "unit": "fused step over plain step, the worst of the sizes",
        "bar": MAX_RATIO,
        "holds": value <= MAX_RATIO,
        "sizes": sizes,
    }
    if options.json:
        print(json.dumps(result))
        return
    for name, size in sizes.items():
        print(
            f"{name:12} {size['ratio']:.3f} ({size['min']:.3f} to {size['max']:.3f}), "
            f"plain step {size['clm_seconds']:.2f} s, {size['tokens_per_second']:,} tokens/s"
        )


if __name__ == "__main__":
    main()
