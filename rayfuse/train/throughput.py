"""How fast a step was, what share of the device it used, and how much memory."""

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
"""Dense matrix products a second in 16 bits, by what is in a GPU's name (makers' data sheets)."""


class ThroughputMeter:
    """Knows a model's size and its device's peak."""

    def __init__(self, engine: Any) -> None:
        model = engine.module.lm[0].model
        config = model.config.get_text_config()
        embedding = model.get_input_embeddings().weight
        sizes = {id(each): _count_elements(each) for each in model.parameters()}
        head = engine.module.head_loss.weight
        self.weights = sum(sizes.values())
        if embedding is not head:  # it is looked up, not multiplied
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
        """Return the measures of a step of this worker.

        Args:
            batches: Its micro-batches.
            tokens: Next tokens learned, of all workers.
            seconds: Of the step.
        """
        mine = sum(len(batch.positions) for batch in batches)
        squares = sum(map(_sum_row_squares, batches))
        # A token costs 2 products a weight forward and 4 backward; attention over half a square.
        flops = 6 * self.weights * mine + 6 * self.attention * squares
        on_gpu = self.device.type == "cuda"
        held = (
            torch.cuda.max_memory_allocated(self.device)
            if on_gpu
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        return {
            "tokens_per_second": tokens / seconds,
            "flops_per_second": flops / seconds,
            "mfu": flops / seconds / self.peak if self.peak else None,
            "memory_gib": held / 2**30,
        }


def _count_elements(parameter: Any) -> int:
    """Return a parameter's size, whole even where ZeRO-3 has put its parts elsewhere."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _sum_row_squares(batch: MicroBatch) -> int:
    if batch.position_ids is None:
        return batch.token_ids.shape[0] * batch.token_ids.shape[1] ** 2
    # The places of a row are 0, 1, ...: their doubled sum is its length squared, less its length.
    return int(2 * batch.position_ids.sum(dtype=np.int64) + batch.position_ids.size)
