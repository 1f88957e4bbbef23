"""Attention over packed rows: which kernels run, and their time over that of the rows alone."""

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.models import build_model
from benchmarks.gpu.rates import read_memory
from benchmarks.gpu.session import UnavailableError
from benchmarks.timing import time_interleaved
from rayfuse.models.attention import FLASH, has_flash_attention
from rayfuse.models.causal_lm import CausalLM, keeps_rows_apart

NEEDED = {
    FLASH: ("flash-attn", has_flash_attention),
    "flex_attention": ("triton", lambda: find_spec("triton") is not None),
}
"""Packages of attention code that runs on GPUs alone, and whether they are installed."""


def measure_packing(
    attention: str, model: str, device: str, shape: dict[str, int], rounds: int
) -> dict[str, Any]:
    """Measure forward and backward of the body over packed rows, and over the rows as a batch.

    Args:
        attention: The library's name of the attention code.
        model: The model's name.
        device: A torch device.
        shape: `tokens`, `row_tokens`, `sequence_tokens` of packed rows, and `sequences` of a batch.
        rounds: Passes of each kind.
    """
    place = torch.device(device)
    if attention in NEEDED:
        package, is_installed = NEEDED[attention]
        if place.type == "cpu" or not is_installed():
            raise UnavailableError(f"{package} is not installed, or there is no GPU")
    lm = build_model(model, place, attention=attention)
    lm = replace(lm, joins_sequences=attention == FLASH)
    sequences, row_tokens = shape["sequences"], shape["row_tokens"]
    rows = sequences * shape["sequence_tokens"] // row_tokens
    token_ids = torch.randint(lm.head.out_features, (rows, row_tokens), device=place)
    packed_ids = token_ids.reshape(sequences, -1)
    positions = torch.arange(row_tokens, device=place).repeat(rows).reshape(sequences, -1)
    with torch.no_grad():
        packed = lm.hidden_states(packed_ids, positions).flatten(0, 1).float()
        alone = lm.hidden_states(token_ids).flatten(0, 1).float()
    timings = time_interleaved(
        {
            "packed": lambda: _differentiate(lm, packed_ids, positions),
            "alone": lambda: _differentiate(lm, token_ids, None),
        },
        place,
        rounds=rounds,
    )
    return {
        "time_over_rows_alone": timings.ratio("packed", "alone"),
        "packed_seconds": timings.median("packed"),
        "tokens_per_second": token_ids.numel() / timings.median("packed"),
        "keeps_rows_apart": keeps_rows_apart(lm),
        "largest_difference": float((packed - alone).abs().max() / alone.std()),
        "kernels": _list_kernels(lm, packed_ids, positions),
        "kernels_of_rows_alone": _list_kernels(lm, token_ids, None),
        **read_memory(place),
    }


def _differentiate(lm: CausalLM, token_ids: torch.Tensor, positions: torch.Tensor | None) -> None:
    lm.hidden_states(token_ids, positions).sum().backward()
    lm.model.zero_grad()


@torch.no_grad()
def _list_kernels(
    lm: CausalLM, token_ids: torch.Tensor, positions: torch.Tensor | None
) -> list[str]:
    """List the attention operators that one forward pass calls."""
    activities = [ProfilerActivity.CPU]  # operators are recorded on the host
    with profile(activities=activities) as profiler:
        lm.hidden_states(token_ids, positions)
    names = {event.name for event in profiler.events() or ()}
    signs = ("attention", "attn")
    return sorted(n for n in names if "::" in n and any(sign in n.lower() for sign in signs))
