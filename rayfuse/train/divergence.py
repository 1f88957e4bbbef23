"""How far the target is from the fused distribution, over a few outcomes per position.

An outcome is one of the fused top-k entries, or the tail: all other tokens together. A temperature
T raises both distributions over these outcomes to the power 1 / T, and the divergence is multiplied
by T^2 to keep the gradients' size (Hinton et al., arXiv 1503.02531, section 2). At every T it is 0
where the two distributions are equal.

To add a divergence: a function here, a line in `DIVERGENCES`, and its name in
`rayfuse.config.train.TrainSettings.divergence`.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float

from rayfuse.config.train import TrainSettings

LOWEST = -1e4
"""Stands for the log-probability of an impossible outcome, and keeps every sum finite."""

MIN_LOGPROB = -20.0
"""Lower bound of a fused log-probability: the codec of the shards stores nothing below."""

Divergence = Callable[
    [
        Float[torch.Tensor, "positions outcomes"],
        Float[torch.Tensor, "positions outcomes"],
        TrainSettings,
    ],
    Float[torch.Tensor, "positions outcomes"],
]
"""From p, the fused probabilities, and log q, the target's log-probabilities: the summands in
nats. They must be differentiable with respect to log q, and finite where p is 0."""


def forward_kl(p: torch.Tensor, log_q: torch.Tensor, settings: TrainSettings) -> torch.Tensor:
    """KL(p || q) = sum p log(p / q)."""
    return torch.xlogy(p, p) - p * log_q


def reverse_kl(p: torch.Tensor, log_q: torch.Tensor, settings: TrainSettings) -> torch.Tensor:
    """KL(q || p) = sum q log(q / p)."""
    return log_q.exp() * (log_q - _log(p).clamp(min=MIN_LOGPROB))


def jensen_shannon(p: torch.Tensor, log_q: torch.Tensor, settings: TrainSettings) -> torch.Tensor:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2."""
    q = log_q.exp()
    log_middle = _log((p + q) / 2)
    return (torch.xlogy(p, p) - p * log_middle + q * (log_q - log_middle)) / 2


def skewed_kl(p: torch.Tensor, log_q: torch.Tensor, settings: TrainSettings) -> torch.Tensor:
    """KL(p || a p + (1 - a) q), a = `train.skew` (DistiLLM, arXiv 2402.03898)."""
    mixed = settings.skew * p + (1 - settings.skew) * log_q.exp()
    return torch.xlogy(p, p) - p * _log(mixed)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skewed_kl": skewed_kl,
}


def diverge(
    probs: Float[torch.Tensor, "positions outcomes"],
    logprobs: Float[torch.Tensor, "positions outcomes"],
    settings: TrainSettings,
    temperature: float,
) -> Float[torch.Tensor, " positions"]:
    """Compute the divergence of each position in nats, differentiable in `logprobs`.

    Args:
        probs: p, the fused distribution; each row sums to 1.
        logprobs: log q, the target's; `LOWEST` for an outcome that does not exist.
        settings: Names the divergence, with its parameters.
        temperature: T.
    """
    p = probs
    if temperature != 1:
        p = probs.pow(1 / temperature)
        p = p / p.sum(1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    log_q = (logprobs / temperature).log_softmax(1)
    nats = DIVERGENCES[settings.divergence](p, log_q, settings)
    return nats.sum(1) * temperature**2


def _log(probs: torch.Tensor) -> torch.Tensor:
    return probs.clamp(min=torch.finfo(probs.dtype).tiny).log()
