"""The merge methods: one tensor of every model in, the merged tensor out.

The formulas are those of docs/explanation/merging.md. A *change* is a model's tensor minus the
pivot's: the target before it was fused. Arithmetic is float32, or float64 for float64 tensors; sums
over a tensor's elements are float64.
"""

import math
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch

from rayfuse.config.merge import METHODS

MAX_COSINE = 0.9995
"""Above this cosine, and below its negative, interpolation is linear: its angle is too small."""


@dataclass(frozen=True)
class TensorSettings:
    """The settings of a merge, for one tensor."""

    weights: tuple[float, ...]
    """By model."""
    seeds: tuple[int, ...]
    """Of the elements of each model that are dropped."""
    t: float
    scale: float
    density: float
    tau: float

    @property
    def shares(self) -> list[float]:
        """The weights, normalised to a sum of 1."""
        total = sum(self.weights)
        return [weight / total for weight in self.weights]


@runtime_checkable
class MergeFunction(Protocol):
    """Merges one tensor of several models."""

    def __call__(
        self, pivot: torch.Tensor, models: Sequence[torch.Tensor], settings: TensorSettings
    ) -> torch.Tensor:
        """Merge a tensor.

        Args:
            pivot: The tensor of the target before fusion, float32 or float64.
            models: The tensors of the models, of the pivot's shape and dtype. Each access may read
                one from disk: those that are not kept are not in memory.
            settings: The settings.
        """
        ...


def load_method(name: str) -> MergeFunction:
    """Import the function of a registered merge method."""
    return cast(MergeFunction, pkgutil.resolve_name(METHODS[name].function))


def average(
    pivot: torch.Tensor, models: Sequence[torch.Tensor], settings: TensorSettings
) -> torch.Tensor:
    """Compute the weighted mean, sum_j w_j theta_j with sum_j w_j = 1 (arXiv 2203.05482)."""
    return _average(models, settings.shares)


def _average(models: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    # From the first model on, so that equal models give exactly that model.
    first = models[0]
    merged = first.clone()
    for model, share in zip(models[1:], shares[1:], strict=True):
        merged.add_(model - first, alpha=share)
    return merged


def interpolate(
    pivot: torch.Tensor, models: Sequence[torch.Tensor], settings: TensorSettings
) -> torch.Tensor:
    """Interpolate on the arc between two tensors as vectors (SLERP, Shoemake 1985).

    sin((1 - t) a) / sin(a) theta_1 + sin(t a) / sin(a) theta_2, with the angle a between them;
    linear where they are nearly parallel, or one is zero.
    """
    first, second = models
    norms = [_sum_squares(model) ** 0.5 for model in (first, second)]
    cosine = 1.0
    if all(norms):
        product = (first / norms[0]) * (second / norms[1])
        cosine = float(product.sum(dtype=torch.float64))
    if abs(cosine) > MAX_COSINE:
        return first + settings.t * (second - first)
    angle = math.acos(cosine)
    shares = [math.sin(part * angle) / math.sin(angle) for part in (1 - settings.t, settings.t)]
    return shares[0] * first + shares[1] * second


def add_changes(
    pivot: torch.Tensor, models: Sequence[torch.Tensor], settings: TensorSettings
) -> torch.Tensor:
    """Compute pivot + scale * sum_j w_j change_j (task arithmetic, arXiv 2212.04089)."""
    merged = pivot.clone()
    for model, weight in zip(models, settings.weights, strict=True):
        merged.add_(model - pivot, alpha=settings.scale * weight)
    return merged


def average_agreeing(
    pivot: torch.Tensor, models: Sequence[torch.Tensor], settings: TensorSettings
) -> torch.Tensor:
    """Average each element over the models whose kept change has the elected sign.

    TIES (arXiv 2306.01708): of each model the largest changes are kept (the share `density`); the
    sign of an element is that of the weighted sum of its kept changes, plus if it is 0; the result
    is the weighted mean of the kept changes with that sign.
    """
    kept = [_keep_largest(model - pivot, settings.density) for model in models]
    return pivot + _average_by_sign(kept, settings.shares)


def _keep_largest(change: torch.Tensor, density: float) -> torch.Tensor:
    num_kept = max(1, int(density * change.numel())) if change.numel() else 0
    return change * _select_largest(change.abs(), num_kept)


def average_dropped(
    pivot: torch.Tensor, models: Sequence[torch.Tensor], settings: TensorSettings
) -> torch.Tensor:
    """Average changes of which random elements are dropped (DARE, arXiv 2311.03099).

    An element is kept with the probability `density`, and divided by it: pivot + sum_j w_j m_j
    change_j / density, whose expectation is the weighted mean.
    """
    merged = pivot.clone()
    for model, share, seed in zip(models, settings.shares, settings.seeds, strict=True):
        random = torch.Generator().manual_seed(seed)
        is_kept = torch.rand(pivot.shape, generator=random) < settings.density
        merged.addcmul_(model - pivot, is_kept.to(pivot.dtype), value=share / settings.density)
    return merged


def average_by_change(
    pivot: torch.Tensor, models: Sequence[torch.Tensor], settings: TensorSettings
) -> torch.Tensor:
    """Average with weights proportional to the mean squared change (VaRM, arXiv 2402.16107).

    Where no model has changed, all have the same weight.
    """
    return _average(models, _normalise([_sum_squares(model - pivot) for model in models]))


def average_selected(
    pivot: torch.Tensor, models: Sequence[torch.Tensor], settings: TensorSettings
) -> torch.Tensor:
    """Select, calculate, erase: SCE (arXiv 2408.07990).

    Select: of the elements whose changes vary between the models (population variance), the share
    `tau` that varies most; with `tau` 1 all elements. Calculate: a model's weight is the sum of
    squares of its selected changes, normalised over the models. Erase: a change whose sign is not
    that of the sum over the models (plus if it is 0) is dropped. The result is the weighted mean of
    the rest, element by element. The released code merges changes that were not selected.
    """
    changes = [model - pivot for model in models]
    if settings.tau < 1:
        variance = _compute_variance(changes)
        num_selected = int(settings.tau * int(variance.count_nonzero()))
        is_selected = _select_largest(variance, num_selected)
        for change in changes:
            change.mul_(is_selected)
    shares = _normalise([_sum_squares(change) for change in changes])
    return pivot + _average_by_sign(changes, shares, signs=sum(changes[1:], start=changes[0]))


def _compute_variance(changes: Sequence[torch.Tensor]) -> torch.Tensor:
    mean = sum(changes[1:], start=changes[0]) / len(changes)
    variance = torch.zeros_like(mean)
    for change in changes:
        variance += (change - mean).square_()
    return variance / len(changes)


def _average_by_sign(
    changes: Sequence[torch.Tensor], shares: Sequence[float], signs: torch.Tensor | None = None
) -> torch.Tensor:
    """Average each element over the changes whose sign is the elected one; 0 where none has it.

    Args:
        changes: Of the models.
        shares: Their weights.
        signs: A tensor with the elected signs, 0 counting as plus; by default the weighted sum.
    """
    if signs is None:
        signs = torch.zeros_like(changes[0])
        for change, share in zip(changes, shares, strict=True):
            signs.add_(change, alpha=share)
    is_plus = signs >= 0
    total, weight = torch.zeros_like(changes[0]), torch.zeros_like(changes[0])
    for change, share in zip(changes, shares, strict=True):
        agrees = torch.where(is_plus, change > 0, change < 0).to(change.dtype)
        total.addcmul_(change, agrees, value=share)
        weight.add_(agrees, alpha=share)
    return total.div_(weight.masked_fill_(weight == 0, 1))


def _select_largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Select the `count` largest of non-negative values, of equal ones the first.

    Returns:
        True where a value is selected.
    """
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    flat = values.flatten()
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    is_selected = flat > threshold
    # Weights in bfloat16 change by few different amounts, so that many values equal the threshold.
    room = count - int(is_selected.sum())
    is_selected[(flat == threshold).nonzero()[:room, 0]] = True
    return is_selected.view(values.shape)


def _sum_squares(tensor: torch.Tensor) -> float:
    return float(tensor.square().sum(dtype=torch.float64))


def _normalise(values: Sequence[float]) -> list[float]:
    total = sum(values)
    return [value / total if total else 1 / len(values) for value in values]
