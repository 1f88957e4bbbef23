"""The loss, from hidden states: full logits exist for one chunk of positions at a time.

L = lambda * CLM + (1 - lambda) * D(fused || target) where a source has a signal, and CLM elsewhere
(FuseLLM, arXiv 2401.10491, equation 5; the paper has no tail). The gradients are computed in the
forward pass, chunk by chunk, so nothing of size [positions, vocab] is kept for the backward pass.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from rayfuse.config.train import TrainSettings
from rayfuse.models.causal_lm import CausalLM, LogitTransform
from rayfuse.models.head_product import multiply_head
from rayfuse.storage.codec import TopK
from rayfuse.train.divergence import LOWEST, diverge

MIN_TARGET_TAIL = 1e-30
"""Lower bound of the target's tail probability, of which the log and the inverse are taken."""

CPU_LOGITS, GPU_LOGITS = 2**24, 2**26
"""Logits per chunk: 64 and 256 MiB in float32."""


@dataclass(frozen=True)
class LossTargets:
    """The training targets of the positions of a micro-batch."""

    next_ids: Int[torch.Tensor, " positions"]
    """The actual next token."""
    sources: Int[torch.Tensor, " positions"]
    """The number of the source that the divergence is reported for; -1 without a signal."""
    top: TopK
    """The fused distributions: distinct tokens. With 0 entries the loss is CLM alone."""

    @property
    def has_signal(self) -> Bool[torch.Tensor, " positions"]:
        """Whether a source has a distribution there; elsewhere the loss is CLM alone."""
        return self.sources >= 0

    def take(self, part: slice) -> "LossTargets":
        """Select some of the positions."""
        top = TopK(self.top.ids[part], self.top.probs[part], self.top.tail[part])
        return LossTargets(self.next_ids[part], self.sources[part], top)


@dataclass(frozen=True)
class LossWeights:
    """The factors of a position's losses in one step."""

    scale: float
    """1 / the positions of the entire step."""
    clm: float
    """lambda, the share of CLM where there is a signal; it is 1 elsewhere."""
    temperature: float = 1.0
    """Of the divergence."""


@dataclass(frozen=True)
class LossForm:
    """What decides the loss of hidden states, besides the head's weights."""

    transform: LogitTransform
    """From the head's outputs to logits."""
    settings: TrainSettings
    """Name D, with its parameters."""
    num_sources: int
    """Sources by which the divergence is reported."""
    chunk_positions: int
    """Positions whose logits exist at a time."""


def build_form(
    head: nn.Linear,
    transform: LogitTransform,
    settings: TrainSettings,
    *,
    num_sources: int,
    chunk_positions: int | None = None,
) -> LossForm:
    """Build the form of the loss under a head.

    Args:
        head: The head, on the device of the hidden states.
        transform: As in `LossForm`.
        settings: As in `LossForm`.
        num_sources: As in `LossForm`.
        chunk_positions: Positions per chunk; by default as many as have `CPU_LOGITS` or
            `GPU_LOGITS` logits.
    """
    device = head.weight.device
    logits = CPU_LOGITS if device.type == "cpu" else GPU_LOGITS
    return LossForm(
        transform=transform,
        settings=settings,
        num_sources=num_sources,
        chunk_positions=chunk_positions or max(1, logits // head.out_features),
    )


def compute_loss(
    hidden: Float[torch.Tensor, "positions width"],
    head: tuple[Float[torch.Tensor, "vocab width"], Float[torch.Tensor, " vocab"] | None],
    targets: LossTargets,
    weights: LossWeights,
    form: LossForm,
) -> tuple[Float[torch.Tensor, ""], Float[torch.Tensor, " parts"]]:
    """Compute the scaled loss, and unscaled sums in nats: CLM, then D by source.

    Args:
        hidden: The head's inputs.
        head: Its weight and its bias.
        targets: What is learned at each position.
        weights: The factors of the losses.
        form: See `build_form`.
    """
    loss, sums = _ChunkedLoss.apply(hidden, *head, targets, weights, form)
    return loss, sums


class HeadLoss(nn.Module):
    """The loss of hidden states under a target's head.

    It holds the head's own parameter, not a copy: ZeRO-3 then gathers the weight for this module,
    and a weight that is tied to the embedding stays tied.
    """

    def __init__(
        self,
        lm: CausalLM,
        settings: TrainSettings,
        *,
        num_sources: int,
        chunk_positions: int | None = None,
    ) -> None:
        """Share a target's head; the other arguments are those of `build_form`."""
        super().__init__()
        self.weight, self.bias = lm.head.weight, lm.head.bias
        self.form = build_form(
            lm.head,
            lm.transform,
            settings,
            num_sources=num_sources,
            chunk_positions=chunk_positions,
        )

    def forward(
        self,
        hidden: Float[torch.Tensor, "positions width"],
        targets: LossTargets,
        weights: LossWeights,
    ) -> tuple[Float[torch.Tensor, ""], Float[torch.Tensor, " parts"]]:
        """Compute the scaled loss, and unscaled sums in nats: CLM, then D by source."""
        return compute_loss(hidden, (self.weight, self.bias), targets, weights, self.form)


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients of a linear head, chunk by chunk."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd takes no keywords)
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: LossTargets,
        weights: LossWeights,
        form: LossForm,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide_dtype = torch.promote_types(hidden.dtype, torch.float32)  # float64 stays float64
        grad_hidden = torch.empty_like(hidden)
        trains_head = ctx.needs_input_grad[1]  # False with LoRA
        grad_weight = torch.zeros_like(weight, dtype=wide_dtype) if trains_head else None
        grad_bias = (
            None if bias is None or not trains_head else torch.zeros_like(bias, dtype=wide_dtype)
        )
        sums = torch.zeros(1 + form.num_sources, dtype=wide_dtype, device=hidden.device)
        loss = torch.zeros((), dtype=wide_dtype, device=hidden.device)
        for start in range(0, len(hidden), form.chunk_positions):
            part = slice(start, start + form.chunk_positions)
            raw = multiply_head(hidden[part], weight, bias)
            logits = form.transform.apply(raw)
            slope = form.transform.slope(logits)
            chunk = _differentiate_chunk(logits, targets.take(part), weights, form)
            loss += chunk.loss
            sums += chunk.sums
            grad = chunk.grad_logits if slope is None else chunk.grad_logits.mul_(slope)
            narrow_grad = grad.to(hidden.dtype)
            torch.mm(narrow_grad, weight, out=grad_hidden[part])
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            # The sum over chunks is float32: a long sum in bfloat16 loses what is added last.
            if grad_weight is not None and narrow_grad.dtype == wide_dtype:
                grad_weight.addmm_(narrow_grad.T, hidden[part])
            elif grad_weight is not None:
                grad_weight += narrow_grad.T @ hidden[part]
            del (
                raw,
                logits,
                slope,
                chunk,
                grad,
                narrow_grad,
            )  # or two chunks would be alive at a time
        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if bias is None or grad_bias is None else grad_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_loss = grad_outputs[0]
        # In place: a second [vocab, width] gradient could be the largest tensor of the step. As
        # saved tensors are changed, torch refuses a second backward pass of the same loss.
        grads = (
            None if grad is None else grad.mul_(grad_loss.to(grad.dtype))
            for grad in ctx.saved_tensors
        )
        return (*grads, None, None, None)


@dataclass(frozen=True)
class _Chunk:
    loss: torch.Tensor
    sums: torch.Tensor
    grad_logits: torch.Tensor


def _differentiate_chunk(
    logits: Float[torch.Tensor, "positions vocab"],
    targets: LossTargets,
    weights: LossWeights,
    form: LossForm,
) -> _Chunk:
    """Compute the loss of a chunk and its gradient by the logits, in the memory of the logits.

    With q = softmax(logits), entries H and the target's tail Q = 1 - sum of q on H, a divergence
    D(log q on H, log Q) that is invariant to a common shift of its arguments has the gradient
    dD / dlog q_i for i on H, and q_i / Q * dD / dlog Q elsewhere.
    """
    if not targets.top.ids.shape[1]:
        return _differentiate_text(logits, targets.next_ids[:, None], weights, form)
    next_ids = targets.next_ids[:, None]
    next_logits = logits.gather(1, next_ids)
    highest = logits.amax(1, keepdim=True)
    has_signal, top_ids = targets.has_signal, targets.top.ids
    is_entry = (top_ids >= 0) & has_signal[:, None]
    # Every row of a scatter has the same length, so unused entries point at a used one: writing the
    # same value twice is harmless. A position without any entry points at token 0, which is added
    # back to the tail.
    first_entry_at = is_entry.int().argmax(1, keepdim=True)
    has_no_entries = ~is_entry.gather(1, first_entry_at)
    ids = torch.where(is_entry, top_ids, top_ids.gather(1, first_entry_at).clamp(min=0))
    entry_logits = logits.gather(1, ids)
    exps = logits.sub_(highest).exp_()
    entry_exps = exps.gather(1, ids)
    exps.scatter_(1, ids, 0.0)
    # The tail is summed over the other tokens: 1 - sum(entries) would cancel where the entries have
    # all of the mass.
    tail_exps = exps.sum(1, keepdim=True) + entry_exps[:, :1] * has_no_entries
    total = tail_exps + (entry_exps * is_entry).sum(1, keepdim=True)
    normaliser = highest + total.log()  # log-sum-exp, stable as no exponent is above 0
    clm = (normaliser - next_logits)[:, 0]

    log_q = (entry_logits - normaliser).clamp(min=LOWEST).masked_fill(~is_entry, LOWEST)
    tail_q = (tail_exps / total).clamp(min=MIN_TARGET_TAIL)
    nats, slopes = _differentiate_outcomes(
        targets, is_entry, torch.cat([log_q, tail_q.log()], 1), weights, form
    )

    signal = has_signal.to(exps.dtype)
    clm_weight = (1 - (1 - weights.clm) * signal) * weights.scale
    fusion_weight = (1 - weights.clm) * signal * weights.scale
    slopes = slopes * fusion_weight[:, None]
    tail_slope = clm_weight[:, None] + slopes[:, -1:] / tail_q
    grad = exps.mul_(tail_slope / total)
    entry_q = entry_exps / total
    entry_grad = torch.where(
        has_no_entries, tail_slope * entry_q, clm_weight[:, None] * entry_q + slopes[:, :-1]
    )
    grad.scatter_(1, ids, torch.where(is_entry, entry_grad, entry_grad.gather(1, first_entry_at)))
    grad.scatter_add_(1, next_ids, -clm_weight[:, None])

    sums = torch.zeros(2 + form.num_sources, dtype=clm.dtype, device=clm.device)
    sums[0] = clm.sum()
    # Source -1, no signal, lands in element 1, which is dropped: no boolean index, no GPU sync.
    sums.index_add_(0, targets.sources + 2, nats * signal)
    loss = (clm * clm_weight).sum() + (nats * fusion_weight).sum()
    return _Chunk(loss, torch.cat([sums[:1], sums[2:]]), grad)


def _differentiate_text(
    logits: Float[torch.Tensor, "positions vocab"],
    next_ids: Int[torch.Tensor, "positions 1"],
    weights: LossWeights,
    form: LossForm,
) -> _Chunk:
    """Compute the same for targets without entries: plain cross-entropy."""
    next_logits = logits.gather(1, next_ids)
    highest = logits.amax(1, keepdim=True)
    exps = logits.sub_(highest).exp_()
    total = exps.sum(1, keepdim=True)
    clm = (highest + total.log() - next_logits).sum()
    grad = exps.mul_(weights.scale / total)
    grad.scatter_add_(1, next_ids, torch.full_like(highest, -weights.scale))
    sums = torch.zeros(1 + form.num_sources, dtype=clm.dtype, device=clm.device)
    sums[0] = clm
    return _Chunk(clm * weights.scale, sums, grad)


def _differentiate_outcomes(
    targets: LossTargets,
    is_entry: Bool[torch.Tensor, "positions entries"],
    logprobs: Float[torch.Tensor, "positions outcomes"],
    weights: LossWeights,
    form: LossForm,
) -> tuple[Float[torch.Tensor, " positions"], Float[torch.Tensor, "positions outcomes"]]:
    """Compute the divergence of each position, and its gradient by the target's log-probabilities.

    A position without a signal has an arbitrary finite value; its weight is 0.
    """
    probs = torch.cat([targets.top.probs * is_entry, targets.top.tail[:, None]], 1)
    with torch.enable_grad():
        logprobs = logprobs.detach().requires_grad_()
        nats = diverge(probs.to(logprobs.dtype), logprobs, form.settings, weights.temperature)
        (slopes,) = torch.autograd.grad(nats.sum(), logprobs)
    return nats.detach(), slopes
