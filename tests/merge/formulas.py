"""The merge methods in NumPy and float64, written from the papers: the oracle of the tests."""

from collections.abc import Callable, Sequence

import numpy as np

Arrays = Sequence[np.ndarray]


def linear(pivot: np.ndarray, models: Arrays, *, weights: Sequence[float]) -> np.ndarray:
    return np.average(np.stack(models), axis=0, weights=weights)


def slerp(pivot: np.ndarray, models: Arrays, *, t: float) -> np.ndarray:
    a, b = (model.ravel() for model in models)
    cosine = np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
    angle = np.arccos(np.clip(cosine, -1, 1))
    if abs(cosine) > 0.9995:
        return (1 - t) * models[0] + t * models[1]
    merged = np.sin((1 - t) * angle) * models[0] + np.sin(t * angle) * models[1]
    return merged / np.sin(angle)


def task_arithmetic(
    pivot: np.ndarray, models: Arrays, *, weights: Sequence[float], scale: float
) -> np.ndarray:
    return pivot + scale * sum(w * (m - pivot) for w, m in zip(weights, models, strict=True))


def ties(
    pivot: np.ndarray, models: Arrays, *, weights: Sequence[float], density: float
) -> np.ndarray:
    changes = []
    for model in models:
        change = (model - pivot).ravel()
        order = np.argsort(-np.abs(change), kind="stable")
        change[order[max(1, int(density * change.size)) :]] = 0
        changes.append(change.reshape(pivot.shape))
    return pivot + _mean_of_sign(changes, weights, np.tensordot(weights, np.stack(changes), 1))


def varm(pivot: np.ndarray, models: Arrays) -> np.ndarray:
    squares = [np.mean((model - pivot) ** 2) for model in models]
    return sum(s / sum(squares) * model for s, model in zip(squares, models, strict=True))


def sce(pivot: np.ndarray, models: Arrays, *, tau: float) -> np.ndarray:
    changes = np.stack([model - pivot for model in models])
    if tau < 1:
        variance = changes.var(axis=0).ravel()
        order = np.argsort(-variance, kind="stable")
        selected = np.zeros(variance.size, bool)
        selected[order[: int(tau * np.count_nonzero(variance))]] = True
        changes = changes * selected.reshape(pivot.shape)
    squares = [float((change**2).sum()) for change in changes]
    total = sum(squares)
    weights = [s / total for s in squares] if total else [1 / len(squares)] * len(squares)
    return pivot + _mean_of_sign(changes, weights, changes.sum(axis=0))


def _mean_of_sign(changes: Arrays, weights: Sequence[float], signs: np.ndarray) -> np.ndarray:
    elected = np.where(signs >= 0, 1.0, -1.0)
    total, weight = np.zeros(signs.shape), np.zeros(signs.shape)
    for change, own in zip(changes, weights, strict=True):
        agrees = np.sign(change) == elected
        total += np.where(agrees, own * change, 0)
        weight += np.where(agrees, own, 0)
    return np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)


FORMULAS: dict[str, Callable[..., np.ndarray]] = {
    "linear": linear,
    "slerp": slerp,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "varm": varm,
    "sce": sce,
}
"""All but DARE, which is random."""
