"""The loss, from hidden states: the full logits exist for a chunk of positions at a time.

L = lambda * CLM + (1 - lambda) * KL(fused || target), the tail as one more outcome (FuseLLM, arXiv
2401.10491, equation 5, with the tail that the paper leaves out). Gradients are formed in the same
pass as the loss, so nothing of size [positions, vocabulary] is kept for the backward pass.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import nn


@dataclass(frozen=True)
class LossTargets:
    """What the positions of a micro-batch are to learn."""

    next_ids: Int[torch.Tensor, " positions"]
    """The token that really comes next."""
    has_signal: Bool[torch.Tensor, " positions"]
    """Some source says something here; elsewhere only the text is learned."""
    top_ids: Int[torch.Tensor, "positions entries"]
    """Tokens of the fused head, none twice; -1 where there is no entry."""
    top_probs: Float[torch.Tensor, "positions entries"]
    tail_probs: Float[torch.Tensor, " positions"]
    """With the head they sum to 1 where there is a signal."""


@dataclass(frozen=True)
class LossScales:
    """What each position's parts are multiplied with: weight over count in the whole step."""

    clm: float
    fusion: float


class HeadLoss(nn.Module):
    """The head's weight, and the loss of hidden states under it.

    It holds the head's own parameter, so that ZeRO-3 gathers it here and sharing it with the
    embedding stays sharing.
    """

    def __init__(self, head: nn.Linear, chunk_positions: int) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        self.chunk_positions = chunk_positions

    def forward(
        self,
        hidden: Float[torch.Tensor, "positions width"],
        targets: LossTargets,
        scales: LossScales,
    ) -> tuple[Float[torch.Tensor, ""], Float[torch.Tensor, "2"]]:
        """Return the scaled loss, and the plain sums of CLM and fusion loss in nats."""
        loss, sums = _ChunkedLoss.apply(
            hidden, self.weight, self.bias, targets, scales, self.chunk_positions
        )
        return loss, sums


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients of a linear head, chunk by chunk."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd takes no keywords)
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: LossTargets,
        scales: LossScales,
        chunk_positions: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)  # float64 stays float64
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=exact)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=exact)
        sums = torch.zeros(2, dtype=exact, device=hidden.device)
        for start in range(0, len(hidden), chunk_positions):
            part = slice(start, start + chunk_positions)
            logits = nn.functional.linear(hidden[part], weight, bias).to(exact)
            chunk_sums, grad_logits = _differentiate_chunk(logits, _take(targets, part), scales)
            sums += chunk_sums
            low = grad_logits.to(hidden.dtype)
            grad_hidden[part] = low @ weight
            grad_weight += (low.T @ hidden[part]).to(exact)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        ctx.save_for_backward(
            grad_hidden,
            grad_weight.to(weight.dtype),
            None if bias is None or grad_bias is None else grad_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(sums)
        return sums[0] * scales.clm + sums[1] * scales.fusion, sums

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_loss = grad_outputs[0]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        scaled = (
            None if grad is None else grad * grad_loss.to(grad.dtype)
            for grad in (grad_hidden, grad_weight, grad_bias)
        )
        return (*scaled, None, None, None)


def _take(targets: LossTargets, part: slice) -> LossTargets:
    return LossTargets(
        targets.next_ids[part],
        targets.has_signal[part],
        targets.top_ids[part],
        targets.top_probs[part],
        targets.tail_probs[part],
    )


def _differentiate_chunk(
    logits: Float[torch.Tensor, "positions vocab"], targets: LossTargets, scales: LossScales
) -> tuple[Float[torch.Tensor, "2"], Float[torch.Tensor, "positions vocab"]]:
    """Return the sums of CLM and fusion loss, and the scaled loss' gradient by the logits.

    With q = softmax(logits), head H, its mass S under the fused distribution p and Q under q, the
    KL with one bucket for the tail has the gradient q - p on H and q (S - Q) / (1 - Q) elsewhere.
    """
    normaliser = logits.logsumexp(1, keepdim=True)
    next_ids = targets.next_ids[:, None]
    clm = (normaliser - logits.gather(1, next_ids)).sum()
    if not targets.top_ids.shape[1]:
        grad = logits.sub_(normaliser).exp_().mul_(scales.clm)
        grad.scatter_add_(1, next_ids, torch.full_like(normaliser, -scales.clm))
        return torch.stack([clm, torch.zeros_like(clm)]), grad
    signal = targets.has_signal[:, None].to(logits.dtype)
    is_entry = (targets.top_ids >= 0) & targets.has_signal[:, None]
    p = targets.top_probs.to(logits.dtype) * is_entry
    tail = targets.tail_probs.to(logits.dtype)[:, None] * signal
    # Empty entries repeat a real one: writing one value twice is harmless. A position without any
    # entry repeats token 0, which then counts as the tail it is.
    real_at = is_entry.int().argmax(1, keepdim=True)
    is_bare = ~is_entry.gather(1, real_at)
    ids = torch.where(is_entry, targets.top_ids, targets.top_ids.gather(1, real_at).clamp(min=0))
    log_q = logits.gather(1, ids) - normaliser
    q = logits.sub_(normaliser).exp_()
    head_q = q.gather(1, ids)
    q.scatter_(1, ids, 0.0)
    tail_q = q.sum(1, keepdim=True) + head_q[:, :1] * is_bare
    tail_q = tail_q.clamp(min=torch.finfo(q.dtype).tiny)
    fusion = (torch.xlogy(p, p) - p * log_q).sum()
    fusion += (torch.xlogy(tail, tail) - tail * tail_q.log()).sum()
    tail_slope = scales.clm + scales.fusion * (signal - tail / tail_q)
    grad = q.mul_(tail_slope)
    head_grad = (scales.clm + scales.fusion * signal) * head_q - scales.fusion * p
    head_grad = torch.where(is_bare, tail_slope * head_q, head_grad)
    grad.scatter_(1, ids, torch.where(is_entry, head_grad, head_grad.gather(1, real_at)))
    grad.scatter_add_(1, next_ids, torch.full_like(normaliser, -scales.clm))
    return torch.stack([clm, fusion]), grad
