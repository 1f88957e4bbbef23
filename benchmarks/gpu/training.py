"""A fused training step beside a plain one, with DeepSpeed or without it."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.gpu.models import build_model, read_attention
from benchmarks.gpu.rates import describe_rate, read_memory
from benchmarks.gpu.session import UnavailableError
from benchmarks.gpu.torch_engine import TorchEngine
from benchmarks.train_step import NUM_STEPS, SOURCES, StepShape, start_process_group, time_steps
from rayfuse.config.train import LoraSettings, TrainSettings
from rayfuse.models.attention import prepare_packing
from rayfuse.train.batches import Packing
from rayfuse.train.deepspeed_engine import build_engine
from rayfuse.train.model import FusionModel
from rayfuse.train.throughput import ThroughputMeter


def measure_training(
    model: str, device: str, engine: str, is_lora: bool, shape: dict[str, int], rounds: int
) -> dict[str, Any]:
    """Measure the steps of one model, interleaved.

    Args:
        model: Its name.
        device: A torch device.
        engine: `deepspeed`: the engine of `rayfuse train`; `torch`: see `TorchEngine`.
        is_lora: Whether adapters are trained instead of all weights.
        shape: `tokens` of a step, `row_tokens`, `sequence_tokens` of packed rows, and `sequences`
            of a micro-batch.
        rounds: Steps of each kind.
    """
    needed = {"deepspeed": engine == "deepspeed", "peft": is_lora}
    for package, is_needed in needed.items():
        if is_needed and find_spec(package) is None:
            raise UnavailableError(f"{package} is not installed")
    settings = TrainSettings(learning_rate=1e-5, lora=LoraSettings() if is_lora else None)
    place = torch.device(device)
    lm, is_packed = prepare_packing(build_model(model, place), pack=True)
    lm.model.train()
    fusion = FusionModel(lm, settings, num_sources=len(SOURCES))
    used = ENGINES[engine](fusion, settings)
    packing = Packing(shape["sequence_tokens"], shape["sequences"], is_packed)
    taken = time_steps(used, StepShape(shape["tokens"], shape["row_tokens"], packing), runs=rounds)
    meter, seconds = ThroughputMeter(used), taken.timings.median("fused")
    found = meter.measure(taken.batches, float(taken.num_positions), seconds)
    ratios = taken.timings.ratios("fused", "clm")
    return {
        "ratio": taken.timings.ratio("fused", "clm"),
        "min_ratio": min(ratios),
        "max_ratio": max(ratios),
        "tokens_per_second": found["tokens_per_second"],
        **describe_rate(found["flops_per_second"], 1.0, place),
        "step_seconds": seconds,
        "loss": taken.loss,
        "weights": meter.size.weights,
        "trained_weights": meter.size.trained,
        "is_packed": is_packed,
        "attention": read_attention(lm),
        **read_memory(place),
    }


def _build_deepspeed(fusion: FusionModel, settings: TrainSettings) -> Any:
    device = fusion.head_loss.weight.device
    start_process_group(device)
    return build_engine(fusion, settings, num_steps=NUM_STEPS, num_workers=1, device=device.type)


def _build_torch(fusion: FusionModel, settings: TrainSettings) -> TorchEngine:
    for weight in fusion.parameters():  # peft's adapters are float32; DeepSpeed casts them, too
        weight.data = weight.data.to(fusion.head_loss.weight.dtype)
    return TorchEngine(fusion, settings, NUM_STEPS)


ENGINES: dict[str, Callable[[FusionModel, TrainSettings], Any]] = {
    "deepspeed": _build_deepspeed,
    "torch": _build_torch,
}
