"""FLOP/s as shares of a GPU's peak and of what a large matrix product reaches."""

import torch

from benchmarks.timing import time_interleaved
from rayfuse.train.throughput import find_peak_flops

GPU_SIDE, CPU_SIDE = 8192, 512


def measure_product_rate(device: torch.device) -> float:
    """Measure the FLOP/s of one large matrix product: bfloat16 on a GPU, float32 on a CPU."""
    on_gpu = device.type == "cuda"
    side, dtype = (GPU_SIDE, torch.bfloat16) if on_gpu else (CPU_SIDE, torch.float32)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    timings = time_interleaved({"product": lambda: left @ right}, device, rounds=5, warm_ups=2)
    return 2 * side**3 / timings.median("product")


def describe_rate(flops: float, seconds: float, device: torch.device) -> dict[str, float]:
    """Describe a computation's FLOP/s; MFU needs a GPU of known peak."""
    peak, rate = find_peak_flops(device), flops / seconds
    mfu = {} if peak is None else {"mfu": rate / peak}
    return mfu | {
        "tflops_per_second": rate / 1e12,
        "share_of_matrix_product": rate / measure_product_rate(device),
    }


def read_memory(device: torch.device) -> dict[str, float]:
    """Read the peak of a GPU's memory; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {"peak_gib": torch.cuda.max_memory_allocated(device) / 2**30}
