"""The paired bootstrap: a difference of two models with its 95 % confidence interval."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

MIN_DOCUMENTS = 6
"""With fewer, all documents differ in the same direction by chance in more than 1 of 20 cases."""

MAX_DRAWS = 4_000_000
"""Documents drawn at a time, which bounds memory to about 100 MB."""


@dataclass(frozen=True)
class Difference:
    """By how much one model exceeds another, in bits per byte or in a task's metric."""

    difference: float
    low: float
    """Lower end of the 95 % interval; -inf where there are too few documents for one."""
    high: float
    """Upper end; inf where there are too few documents."""
    num_documents: int
    higher_is_better: bool = False
    """False for bits per byte and other losses."""

    @property
    def outcome(self) -> Literal["better", "worse", "unclear"]:
        """Judge the first model against the second; unclear where the interval contains zero."""
        if self.low <= 0 <= self.high:
            return "unclear"
        return "better" if (self.low > 0) == self.higher_is_better else "worse"


def bootstrap(
    values: Float[np.ndarray, " documents"],
    weights: Float[np.ndarray, " documents"] | Int[np.ndarray, " documents"],
    *,
    samples: int,
    seed: int,
) -> Difference:
    """Compute sum(values) / sum(weights) and its 95 % interval by resampling documents.

    This is the percentile bootstrap (Efron and Tibshirani 1993, chapter 13) over paired documents:
    both models are evaluated on the same resample, so the variation between documents cancels.

    Args:
        values: Difference of the two models on each document, such as bits.
        weights: Denominator of each document, such as bytes.
        samples: Number of resamples.
        seed: Seed of the resampling.
    """
    num_documents = len(values)
    difference = float(values.sum() / weights.sum())
    if num_documents < MIN_DOCUMENTS:
        return Difference(difference, -math.inf, math.inf, num_documents)
    random = np.random.default_rng(seed)
    step = max(1, MAX_DRAWS // num_documents)
    means: list[Float[np.ndarray, " step"]] = []
    for start in range(0, samples, step):
        shape = (min(step, samples - start), num_documents)
        drawn = random.integers(0, num_documents, shape)
        means.append(values[drawn].sum(axis=1) / weights[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Difference(difference, float(low), float(high), num_documents)
