"""Seconds of computations on a CPU or a GPU, in interleaved rounds: a drift changes all alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timings:
    """The seconds of several computations, by round."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Take the median of a computation's seconds."""
        return statistics.median(self.seconds[name])

    def ratios(self, name: str, to: str) -> list[float]:
        """Divide the seconds of two computations, round by round."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return [seconds / others for seconds, others in pairs]

    def ratio(self, name: str, to: str) -> float:
        """Take the median of the ratios of all rounds."""
        return statistics.median(self.ratios(name, to))


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_interleaved(
    parts: Mapping[str, Callable[[], Any]], device: torch.device, *, rounds: int, warm_ups: int = 1
) -> Timings:
    """Run computations in turn, several rounds, and time each.

    Args:
        parts: The computations, by name.
        device: Where they run.
        rounds: Rounds that are timed.
        warm_ups: Rounds before, which are not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(warm_ups + rounds):
        for name, compute in parts.items():
            synchronize(device)
            began = time.perf_counter()
            compute()
            synchronize(device)
            if number >= warm_ups:
                seconds[name].append(time.perf_counter() - began)
    return Timings(seconds)
