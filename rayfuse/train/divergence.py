"""How far the target is from the fused distribution, over a few outcomes per position.

An outcome is a token of the fused head, or the tail: all other tokens as one. A temperature T
raises both distributions over these outcomes to the power 1 / T and is made up for by a factor
T^2 (Hinton et al., arXiv 1503.02531); at every T the divergence is 0 where the two broadcast.
"""

import torch
from jaxtyping import Float

from rayfuse.config.train import TrainSettings

LOWEST = -1e4
"""Stands for the log-probability of what cannot be, and keeps every sum finite."""

MIN_LOGPROB = -20.0
"""What the log of a fused probability counts as at least: shards store nothing below."""


def diverge(
    probs: Float[torch.Tensor, "positions outcomes"],
    logprobs: Float[torch.Tensor, "positions outcomes"],
    settings: TrainSettings,
    temperature: float,
) -> Float[torch.Tensor, " positions"]:
    """Return the divergence of each position in nats, with gradients by `logprobs`.

    Args:
        probs: p, the fused distribution; each row sums to 1.
        logprobs: log q, the target's; `LOWEST` for an outcome that is not there.
        settings: forward KL is sum p log(p / q), reverse KL sum q log(q / p), Jensen-Shannon the
            mean of the KL of p and of q to their middle, skewed KL (arXiv 2402.03898) sum
            p log(p / (a p + (1 - a) q)).
        temperature: T.
    """
    p = probs
    if temperature != 1:
        p = probs.pow(1 / temperature)
        p = p / p.sum(1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    log_q = (logprobs / temperature).log_softmax(1)
    match settings.divergence:
        case "forward_kl":
            nats = torch.xlogy(p, p) - p * log_q
        case "reverse_kl":
            nats = log_q.exp() * (log_q - _log(p).clamp(min=MIN_LOGPROB))
        case "jensen_shannon":
            q = log_q.exp()
            middle = _log((p + q) / 2)
            nats = (torch.xlogy(p, p) - p * middle + q * (log_q - middle)) / 2
        case "skewed_kl":
            mixed = settings.skew * p + (1 - settings.skew) * log_q.exp()
            nats = torch.xlogy(p, p) - p * _log(mixed)
    return nats.sum(1) * temperature**2


def _log(probs: torch.Tensor) -> torch.Tensor:
    return probs.clamp(min=torch.finfo(probs.dtype).tiny).log()
