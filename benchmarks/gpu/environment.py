"""What a run was measured on."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.gpu.rates import measure_product_rate
from rayfuse.train.throughput import find_peak_flops

PACKAGES = (
    *("torch", "transformers", "triton", "deepspeed", "peft"),
    *("flash-attn", "kernels", "liger-kernel"),
)


def describe_environment(device: str) -> dict[str, Any]:
    """Describe the device and the versions, and measure a matrix product."""
    place = torch.device(device)
    on_gpu = place.type == "cuda"
    rate, peak = measure_product_rate(place), find_peak_flops(place)
    found: dict[str, Any] = {"matrix_product_tflops_per_second": rate / 1e12}
    if peak is not None:
        found |= {"peak_tflops_per_second": peak / 1e12, "matrix_product_of_peak": rate / peak}
    if on_gpu:
        capability = torch.cuda.get_device_capability(place)
        found |= {
            "device": torch.cuda.get_device_name(place),
            "devices": torch.cuda.device_count(),
            "memory_gib": torch.cuda.get_device_properties(place).total_memory / 2**30,
            "capability": f"{capability[0]}.{capability[1]}",
            "cuda": str(torch.version.cuda),
        }
    found["python"] = platform.python_version()
    return found | {name: _find_version(name) for name in PACKAGES}


def _find_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
