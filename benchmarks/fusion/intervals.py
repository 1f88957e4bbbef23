"""Differences between models over documents and seeds, each with its 95 % interval.

Two things are random: the held-out documents, and the seed, which decides the training documents of
each model, their initial weights and their order. The difference is the mean over seeds. Its
half-width is the root of the sum of two squares: the half-width of the paired bootstrap over
documents, on the means over seeds, and that of Student's t over the seeds. Variation that both
contain is counted twice, so the intervals are conservative.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Float

from rayfuse.evaluate.scores import DocumentScore, Evaluation, bits_per_byte, compare_evaluations

Variant = TypeVar("Variant")

STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
"""97.5 % quantile by the number of seeds."""

SAMPLES = 2_000

MAX_DOUBLINGS = 1.0
"""How far a curve is extrapolated, in doublings of the text: further on it says nothing."""

Documents = Sequence[tuple[str, str, int]]
"""Name, domain and bytes of each held-out document."""

Nats = Float[np.ndarray, "seeds documents"]
"""NLL of each document under one variant, by seed."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def outcome(self) -> str:
        """The claim that the interval allows: better only if all of it is below zero."""
        if self.high < 0:
            return "better"
        return "worse" if self.low > 0 else "unclear"


def score_groups(nats: Float[np.ndarray, " documents"], documents: Documents) -> dict[str, float]:
    """Compute bits per byte of all documents and of each domain."""
    return bits_per_byte(_evaluation(nats, documents).documents)


def compare_groups(a: Nats, b: Nats, documents: Documents) -> dict[str, Interval]:
    """Compute by how many bits per byte `a` exceeds `b`, over all documents and by domain."""
    pooled = compare_evaluations(
        _evaluation(a.mean(axis=0), documents),
        _evaluation(b.mean(axis=0), documents),
        samples=SAMPLES,
        seed=0,
    )
    by_seed = [
        (score_groups(ours, documents), score_groups(theirs, documents))
        for ours, theirs in zip(a, b, strict=True)
    ]
    found: dict[str, Interval] = {}
    for group, gap in pooled.items():
        spread = spread_over_seeds([ours[group] - theirs[group] for ours, theirs in by_seed])
        found[group] = Interval(
            gap.difference,
            gap.difference - math.hypot(gap.difference - gap.low, spread),
            gap.difference + math.hypot(gap.high - gap.difference, spread),
        )
    return found


def spread_over_seeds(values: Sequence[float]) -> float:
    """Compute the half-width of a mean's 95 % interval over seeds; 0 for a single seed."""
    if len(values) < 2:
        return 0.0
    return STUDENT_T[len(values)] * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def find_multiple(fused: Nats, clm: dict[int, Nats], documents: Documents) -> tuple[Interval, bool]:
    """Compute the multiple of tokens with which CLM reaches the loss of fusion.

    The loss is interpolated linearly in the logarithm of the tokens, and extrapolated by at most
    `MAX_DOUBLINGS`; the second result is False if the interval needs extrapolation.

    Args:
        fused: NLL of the fused model, which has the tokens once.
        clm: NLL of CLM by multiple of the tokens, 1 among them.
        documents: The documents of the half.
    """

    def measure(losses: Mapping[int, float]) -> float:
        return _interpolate(losses[0], {times: losses[times] for times in clm})

    logs = measure_interval(measure, {0: fused} | clm, documents)
    interval = Interval(2**logs.value, 2**logs.low, 2**logs.high)
    return interval, interval.high <= max(clm)


def measure_interval(
    measure: Callable[[Mapping[Variant, float]], float],
    nats: Mapping[Variant, Nats],
    documents: Documents,
) -> Interval:
    """Compute a quantity of several variants' losses, and its interval.

    Args:
        measure: Computes it from the loss of each variant, in nats per byte.
        nats: The variants, all of the same seeds.
        documents: The documents of the half.
    """
    num_bytes = np.array([size for _, _, size in documents])
    draw = np.random.default_rng(0)

    def measure_part(chosen: np.ndarray, seeds: slice) -> float:
        return measure(
            {
                variant: float(
                    of_variant[seeds, chosen].sum(axis=1).mean() / num_bytes[chosen].sum()
                )
                for variant, of_variant in nats.items()
            }
        )

    everything = np.arange(len(num_bytes))
    value = measure_part(everything, slice(None))
    draws = [
        measure_part(draw.integers(0, len(num_bytes), len(num_bytes)), slice(None))
        for _ in range(SAMPLES)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    num_seeds = len(next(iter(nats.values())))
    spread = spread_over_seeds(
        [measure_part(everything, slice(seed, seed + 1)) for seed in range(num_seeds)]
    )
    return Interval(
        value, value - math.hypot(value - low, spread), value + math.hypot(high - value, spread)
    )


def _interpolate(goal: float, losses: dict[int, float]) -> float:
    """Compute the logarithm (base 2) of the multiple at which CLM has the goal's loss.

    More text never counts as worse: the curve is the lowest loss up to each multiple.
    """
    times = sorted(losses)
    logs = [math.log2(multiple) for multiple in times]
    curve = np.minimum.accumulate([losses[multiple] for multiple in times])
    index = next((at for at in range(1, len(times)) if goal >= curve[at]), len(times) - 1)
    slope = (curve[index] - curve[index - 1]) / (logs[index] - logs[index - 1])
    beyond = goal - curve[index - 1]
    if slope == 0:
        found = logs[index - 1] if beyond >= 0 else math.inf
    else:
        found = logs[index - 1] + beyond / slope
    return float(np.clip(found, -MAX_DOUBLINGS, logs[-1] + MAX_DOUBLINGS))


def _evaluation(nats: Float[np.ndarray, " documents"], documents: Documents) -> Evaluation:
    scores = [
        DocumentScore(name, domain, num_bytes, float(each))
        for (name, domain, num_bytes), each in zip(documents, nats, strict=True)
    ]
    return Evaluation("variant", "fused", "", scores, 0.0)
