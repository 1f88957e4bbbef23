"""The throughput, model FLOPs utilization (MFU) and peak memory of a training step."""

import resource
from collections.abc import Sequence
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


class ThroughputMeter:
    """Measures steps of one worker against its model's size and its device's peak."""

    def __init__(self, engine: Any) -> None:
        model = engine.module.lm[0].model
        config = model.config.get_text_config()
        embedding = model.get_input_embeddings().weight
        sizes = {id(weight): _count_elements(weight) for weight in model.parameters()}
        head = engine.module.head_loss.weight
        self.weights = sum(sizes.values())
        if embedding is not head:  # an input embedding is looked up, not multiplied
            self.weights -= sizes.get(id(embedding), 0)
        self.attention = config.num_hidden_layers * config.hidden_size
        self.device: torch.device = engine.device
        self.peak = None
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
            self.peak = next((peak for kind, peak in PEAK_FLOPS.items() if kind in name), None)

    def measure(
        self, batches: Sequence[MicroBatch], tokens: float, seconds: float
    ) -> dict[str, Any]:
        """Measure a step: throughput of all workers, FLOP/s, MFU and memory of this one.

        FLOPs are the model's own (PaLM, arXiv 2204.02311, appendix B, with causal attention as half
        a square): activations that gradient checkpointing computes again do not count.

        Args:
            batches: This worker's micro-batches.
            tokens: Next tokens learned by all workers.
            seconds: Duration of the step.
        """
        positions = sum(len(batch.positions) for batch in batches)
        squares = sum(map(_sum_row_squares, batches))
        # 2 FLOPs per weight and token forward, 4 backward.
        flops = 6 * self.weights * positions + 6 * self.attention * squares
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
