"""The throughput, model FLOPs utilization (MFU) and peak memory of a training step."""

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rayfuse.train.batches import MicroBatch

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Dense 16-bit FLOP/s by a part of the GPU's name (from the vendors' data sheets)."""


@dataclass(frozen=True)
class ModelSize:
    """The sizes that the FLOPs of a model follow from (PaLM, arXiv 2204.02311, appendix B)."""

    weights: int
    """Those that every token is multiplied with."""
    trained: int
    """Of them, those that get a gradient: with LoRA, the adapters alone."""
    attention: int
    """Layers times the width of all heads."""

    def count_forward(self, tokens: int, squares: int) -> int:
        """Count the FLOPs of a forward pass, with causal attention as half a square.

        Args:
            tokens: Those of all rows.
            squares: The sum of the rows' squared lengths.
        """
        return 2 * self.weights * tokens + 2 * self.attention * squares

    def count_training(self, tokens: int, squares: int) -> int:
        """Count those of a forward and backward pass; recomputed activations do not count."""
        return (4 * self.weights + 2 * self.trained) * tokens + 6 * self.attention * squares


def measure_size(model: Any, head_weight: torch.Tensor) -> ModelSize:
    """Measure a Hugging Face model.

    Args:
        model: The model, with adapters if it has any.
        head_weight: Its head's, which may be the input embedding.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    head_width = getattr(config, "head_dim", None)  # absent where it is width / heads
    used = {id(weight): weight for weight in model.parameters()}
    embedding = model.get_input_embeddings().weight
    if embedding is not head_weight:  # an input embedding is looked up, not multiplied
        used.pop(id(embedding), None)
    return ModelSize(
        weights=sum(map(_count_elements, used.values())),
        trained=sum(_count_elements(weight) for weight in used.values() if weight.requires_grad),
        attention=config.num_hidden_layers
        * (heads * head_width if heads and head_width else config.hidden_size),
    )


def find_peak_flops(device: torch.device) -> float | None:
    """Find the peak of a GPU by its name; None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for kind, peak in PEAK_FLOPS.items() if kind in name), None)


class ThroughputMeter:
    """Measures steps of one worker against its model's size and its device's peak."""

    def __init__(self, engine: Any) -> None:
        self.size = measure_size(engine.module.lm[0].model, engine.module.head_loss.weight)
        self.device: torch.device = engine.device
        self.peak = find_peak_flops(self.device)

    def measure(
        self, batches: Sequence[MicroBatch], tokens: float, seconds: float
    ) -> dict[str, Any]:
        """Measure a step: throughput of all workers, FLOP/s, MFU and memory of this one.

        FLOPs are the model's own: activations that gradient checkpointing recomputes do not count.

        Args:
            batches: This worker's micro-batches.
            tokens: Next tokens learned by all workers.
            seconds: Duration of the step.
        """
        positions = sum(len(batch.positions) for batch in batches)
        squares = sum(map(_sum_row_squares, batches))
        flops = self.size.count_training(positions, squares)
        on_gpu = self.device.type == "cuda"
        peak_bytes = (
            torch.cuda.max_memory_allocated(self.device)
            if on_gpu
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        return {
            "tokens_per_second": tokens / seconds,
            "flops_per_second": flops / seconds,
            "mfu": flops / seconds / self.peak if self.peak else None,
            "memory_gib": peak_bytes / 2**30,
        }


def _count_elements(parameter: Any) -> int:
    """Return the full size of a parameter, also where ZeRO-3 has partitioned it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _sum_row_squares(batch: MicroBatch) -> int:
    if batch.position_ids is None:
        return batch.token_ids.shape[0] * batch.token_ids.shape[1] ** 2
    # Row positions count 0, 1, ..., n - 1; they sum to (n^2 - n) / 2, so n^2 = 2 * sum + n.
    return int(2 * batch.position_ids.sum(dtype=np.int64) + batch.position_ids.size)
