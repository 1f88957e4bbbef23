"""One model over two devices: records as on one device."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.capture import build_capture
from benchmarks.gpu.session import UnavailableError
from benchmarks.timing import time_interleaved
from rayfuse.capture.engines.base import Failure
from rayfuse.models.causal_lm import CausalLM


def compare_spread(
    model: str, devices: list[str], tokens: int, row_tokens: int, rounds: int
) -> dict[str, float]:
    """Measure how records of a spread model differ, and its time over that of one device."""
    missing = torch.device(devices[-1]).index or 0
    if devices[0] != "cpu" and torch.cuda.device_count() <= missing:
        raise UnavailableError(f"there is one GPU, not {len(devices)}")
    first, second = map(torch.device, devices)
    capture = build_capture(model, first, tokens, row_tokens)
    scorer = capture.build_scorer()
    alone = scorer.score_rows(capture.rows)
    parts = {"rows": lambda: scorer.score_rows(capture.rows)}
    on_one = time_interleaved(parts, first, rounds=rounds)
    spread_layers(capture.lm, first, second)  # the scorer refers to the same model
    others = scorer.score_rows(capture.rows)
    on_two = time_interleaved(parts, first, rounds=rounds)
    differences: list[float] = []
    for record, other in zip(alone, others, strict=True):
        assert not isinstance(record, Failure) and not isinstance(other, Failure)
        differences.append(float(np.abs(record.next_logprobs - other.next_logprobs).max()))
    return {
        "largest_difference_nats": max(differences),
        "time_ratio": on_two.median("rows") / on_one.median("rows"),
    }


def spread_layers(lm: CausalLM, first: torch.device, second: torch.device) -> None:
    """Move the second half of the layers to another device; embedding, norm and head stay.

    Hooks move what each part is called with.
    """
    body: Any = lm.body
    half = len(body.layers) // 2
    places = [(layer, second) for layer in body.layers[half:]] + [(body.norm, first)]
    for part, device in places:
        part.to(device)
        part.register_forward_pre_hook(
            lambda _, given, named, device=device: (_move(given, device), _move(named, device)),
            with_kwargs=True,
        )


def _move(given: Any, device: torch.device) -> Any:
    """Move the tensors of nested arguments to a device."""
    if isinstance(given, torch.Tensor):
        return given.to(device)
    if isinstance(given, tuple):
        return tuple(_move(item, device) for item in given)
    if isinstance(given, Mapping):
        return {name: _move(item, device) for name, item in given.items()}
    return given
