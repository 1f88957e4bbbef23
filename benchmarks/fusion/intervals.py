"""Differences between models over documents and seeds, each with its 95 % interval.

Two things were drawn by chance: the held-out documents and the seeds, of which everything depends
(which documents train whom, the models' weights, the order). The difference is the mean over seeds.
Its interval adds up, as the root of the sum of squares, the half-width of rayfuse's paired
bootstrap over documents, on the means over seeds, and Student's half-width over the seeds. What is
drawn by both is then counted twice, so that the intervals are rather too wide than too narrow.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from rayfuse.evaluate.scores import DocumentScore, Evaluation, bits_per_byte, compare_evaluations

STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
"""97.5 % quantile by the number of seeds."""

SAMPLES = 2_000

Documents = Sequence[tuple[str, str, int]]
"""Name, domain and bytes of each held-out document."""

Nats = Float[np.ndarray, "seeds documents"]
"""What one variant pays for each document, by seed."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def outcome(self) -> str:
        """What may be claimed: better only where the whole interval is below zero."""
        if self.high < 0:
            return "better"
        return "worse" if self.low > 0 else "unclear"


def score_groups(nats: Float[np.ndarray, " documents"], documents: Documents) -> dict[str, float]:
    """Return bits per byte of all documents and of each domain."""
    return bits_per_byte(_evaluation(nats, documents).documents)


def compare_groups(a: Nats, b: Nats, documents: Documents) -> dict[str, Interval]:
    """Return by how much `a` pays more than `b`, in bits per byte, over all and by domain."""
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
    for group, each in pooled.items():
        spread = spread_over_seeds([ours[group] - theirs[group] for ours, theirs in by_seed])
        found[group] = Interval(
            each.difference,
            each.difference - math.hypot(each.difference - each.low, spread),
            each.difference + math.hypot(each.high - each.difference, spread),
        )
    return found


def spread_over_seeds(values: Sequence[float]) -> float:
    """Return the half-width of a mean's 95 % interval over seeds; 0 for a single one."""
    if len(values) < 2:
        return 0.0
    return STUDENT_T[len(values)] * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def find_multiple(fused: Nats, clm: dict[int, Nats], documents: Documents) -> tuple[Interval, bool]:
    """Return how many times the tokens CLM needs for what fusion reaches, and whether that is in
    sight.

    Between the multiples that were trained the loss is taken to fall evenly with the logarithm of
    the tokens, and beyond the last as between the last two, which is then said to be out of sight.

    Args:
        fused: At once the tokens.
        clm: By multiple, 1 among them.
        documents: Of the half.
    """
    num_bytes = np.array([each[2] for each in documents])
    draw = np.random.default_rng(0)

    def measure(chosen: np.ndarray, seeds: slice) -> float:
        costs = {
            times: float(nats[seeds].mean(axis=0)[chosen].sum() / num_bytes[chosen].sum())
            for times, nats in clm.items()
        }
        goal = float(fused[seeds].mean(axis=0)[chosen].sum() / num_bytes[chosen].sum())
        return _interpolate(goal, costs)

    everything = np.arange(len(num_bytes))
    value = measure(everything, slice(None))
    draws = [
        measure(draw.integers(0, len(num_bytes), len(num_bytes)), slice(None))
        for _ in range(SAMPLES)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    spread = spread_over_seeds(
        [measure(everything, slice(seed, seed + 1)) for seed in range(len(fused))]
    )
    interval = Interval(
        2**value,
        2 ** (value - math.hypot(value - low, spread)),
        2 ** (value + math.hypot(high - value, spread)),
    )
    return interval, interval.high <= max(clm)


def _interpolate(goal: float, costs: dict[int, float]) -> float:
    """Return the logarithm (base 2) of the multiple at which CLM costs as much as the goal."""
    times = sorted(costs)
    logs = [math.log2(each) for each in times]
    for index in range(1, len(times)):
        before, after = costs[times[index - 1]], costs[times[index]]
        is_last = index == len(times) - 1
        if goal >= after or is_last:
            slope = (after - before) / (logs[index] - logs[index - 1])
            return logs[index - 1] + (goal - before) / min(slope, -1e-9)
    raise AssertionError("there are at least two multiples")


def _evaluation(nats: Float[np.ndarray, " documents"], documents: Documents) -> Evaluation:
    scores = [
        DocumentScore(name, domain, num_bytes, float(each))
        for (name, domain, num_bytes), each in zip(documents, nats, strict=True)
    ]
    return Evaluation("variant", "fused", "", scores, 0.0)
