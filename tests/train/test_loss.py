"""The loss against dense formulas in float64, written out one position at a time."""

import math
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn

from rayfuse.config.train import TrainSettings
from rayfuse.fuse.rules import give_tail_to
from rayfuse.models.causal_lm import CausalLM, LogitTransform
from rayfuse.storage.codec import TopK
from rayfuse.train.divergence import DIVERGENCES
from rayfuse.train.loss import HeadLoss, LossTargets, LossWeights

POSITIONS, WIDTH, VOCAB, ENTRIES, SOURCES = 11, 6, 13, 4, 3


def random_targets(tail: str = "bucket", seed: int = 0) -> LossTargets:
    """Fused heads of 4, 3 (the first or last entry missing) or 0 tokens; a tail everywhere."""
    random = np.random.default_rng(seed)
    ids = np.stack([random.permutation(VOCAB)[:ENTRIES] for _ in range(POSITIONS)]).astype(np.int32)
    probs = random.random((POSITIONS, ENTRIES + 1)) + 0.01
    ids[2, -1], probs[2, ENTRIES - 1] = -1, 0.0
    ids[3, 0], probs[3, 0] = -1, 0.0
    has_signal = np.ones(POSITIONS, dtype=bool)
    if tail != "renormalise":  # there, all tail is no signal
        ids[4], probs[4, :ENTRIES] = -1, 0.0
    has_signal[5:7] = False
    ids[6] = -1
    if tail == "renormalise":
        probs[:, ENTRIES] = 0
    probs /= probs.sum(1, keepdims=True)
    next_ids = random.integers(VOCAB, size=POSITIONS)
    next_ids[0] = ids[0, 1]  # a token of the head
    selected = np.where(has_signal, random.integers(SOURCES, size=POSITIONS), -1)
    top = TopK(ids, probs[:, :ENTRIES], probs[:, ENTRIES])
    if tail == "truth":
        top = give_tail_to(next_ids, top, has_signal)
    return LossTargets(
        next_ids=torch.tensor(next_ids),
        sources=torch.tensor(selected),
        top=TopK(torch.tensor(top.ids).long(), torch.tensor(top.probs), torch.tensor(top.tail)),
    )


def test_every_divergence_of_the_recipe_is_registered_and_no_other():
    names = get_args(TrainSettings.model_fields["divergence"].annotation)
    assert sorted(names) == sorted(DIVERGENCES)


def dense_divergence(
    p: torch.Tensor, q: torch.Tensor, settings: TrainSettings, heat: float
) -> torch.Tensor:
    """D of two lists of outcomes, each a distribution, both at a temperature."""
    p, q = p ** (1 / heat), q ** (1 / heat)
    p, q = p / p.sum(), q / q.sum()
    total = torch.zeros((), dtype=q.dtype)
    for left, right in zip(p, q, strict=True):
        middle = (left + right) / 2
        skewed = settings.skew * left + (1 - settings.skew) * right
        if settings.divergence == "forward_kl" and left > 0:
            total = total + left * (left / right).log()
        if settings.divergence == "reverse_kl":
            total = total + right * (right.log() - max(math.log(left) if left else -math.inf, -20))
        if settings.divergence == "jensen_shannon":
            total = total + right * (right / middle).log() / 2
            if left > 0:
                total = total + left * (left / middle).log() / 2
        if settings.divergence == "skewed_kl" and left > 0:
            total = total + left * (left / skewed).log()
    return total * heat**2


def dense_loss(
    logits: torch.Tensor, targets: LossTargets, weights: LossWeights, settings: TrainSettings
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss from full distributions, and the sums that are reported."""
    loss = torch.zeros((), dtype=logits.dtype)
    sums = [torch.zeros((), dtype=logits.dtype) for _ in range(1 + SOURCES)]
    for t in range(POSITIONS):
        q = logits[t].softmax(0)
        clm = -q[targets.next_ids[t]].log()
        sums[0] = sums[0] + clm
        if not targets.has_signal[t]:
            loss = loss + weights.scale * clm
            continue
        pairs = zip(targets.top.ids[t].tolist(), targets.top.probs[t], strict=True)
        entries = [(i, p) for i, p in pairs if i >= 0]
        in_head = torch.zeros(VOCAB, dtype=torch.bool)
        in_head[[i for i, _ in entries]] = True
        p = torch.stack([*(p for _, p in entries), targets.top.tail[t]])
        outcomes = torch.stack([*(q[i] for i, _ in entries), q[~in_head].sum()])
        nats = dense_divergence(p, outcomes, settings, weights.temperature)
        loss = loss + weights.scale * (weights.clm * clm + (1 - weights.clm) * nats)
        sums[1 + int(targets.sources[t])] = sums[1 + int(targets.sources[t])] + nats
    return loss, sums


def make_head(
    settings: TrainSettings,
    head: nn.Linear,
    chunk: int = 4,
    transform: LogitTransform | None = None,
) -> HeadLoss:
    lm = CausalLM(nn.Identity(), nn.Identity(), head, transform or LogitTransform())
    return HeadLoss(lm, settings, num_sources=SOURCES, chunk_positions=chunk)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", ["bucket", "truth", "renormalise"])
@pytest.mark.parametrize("heat", [1.0, 2.5, 0.6])
@pytest.mark.parametrize("is_tied", [False, True])
def test_loss_and_gradients_equal_the_dense_formula(divergence, tail, heat, is_tied):
    torch.manual_seed(1)
    settings = TrainSettings(divergence=divergence, skew=0.2)
    embedding = nn.Embedding(VOCAB, WIDTH, dtype=torch.float64)
    body = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    head = nn.Linear(WIDTH, VOCAB, bias=not is_tied, dtype=torch.float64)
    if is_tied:
        head.weight = embedding.weight
    targets = random_targets(tail)
    weights = LossWeights(scale=1 / POSITIONS, clm=0.3, temperature=heat)
    wanted = [embedding.weight, body.weight, *([] if is_tied else head.parameters())]

    def states() -> torch.Tensor:
        return body(embedding(torch.arange(POSITIONS) % VOCAB)).tanh() * 2

    expected, expected_sums = dense_loss(head(states()), targets, weights, settings)
    expected_grads = torch.autograd.grad(expected, wanted)
    for chunk in (1, 4, 100):
        loss, sums = make_head(settings, head, chunk)(states(), targets, weights)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            sums, torch.stack(expected_sums).detach(), rtol=1e-11, atol=1e-12
        )
        grads = torch.autograd.grad(loss, wanted)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_are_those_of_finite_differences(divergence):
    torch.manual_seed(2)
    targets = random_targets()
    weights = LossWeights(scale=0.1, clm=0.3, temperature=1.7)

    def loss(hidden: Any, weight: Any, bias: Any) -> Any:
        head = nn.Linear(WIDTH, VOCAB, dtype=torch.float64)
        layer = make_head(TrainSettings(divergence=divergence), head)
        del layer.weight, layer.bias
        layer.weight, layer.bias = weight, bias
        return layer(hidden, targets, weights)[0]

    shapes = [(POSITIONS, WIDTH), (VOCAB, WIDTH), (VOCAB,)]
    inputs = tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(partial(Recomputed.apply, loss), inputs, atol=1e-6)


class Recomputed(torch.autograd.Function):
    """A loss computed again for each backward pass: gradcheck needs several, the loss has one."""

    @staticmethod
    def forward(ctx: Any, function: Any, *inputs: Any) -> Any:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            return None, *torch.autograd.grad(ctx.function(*inputs), inputs, grad_outputs)


@pytest.mark.parametrize(
    "transform", [LogitTransform(0.25), LogitTransform(1.0, 3.0), LogitTransform(2.0, 5.0)]
)
def test_scaled_and_capped_logits_have_their_gradients(transform):
    torch.manual_seed(3)
    head = nn.Linear(WIDTH, VOCAB, dtype=torch.float64)
    hidden = torch.randn(POSITIONS, WIDTH, dtype=torch.float64, requires_grad=True)
    targets, weights = random_targets(), LossWeights(scale=0.1, clm=0.4)
    logits = head(hidden) * transform.scale
    if transform.cap is not None:
        logits = transform.cap * (logits / transform.cap).tanh()
    expected, _ = dense_loss(logits, targets, weights, TrainSettings())
    loss, _ = make_head(TrainSettings(), head, 4, transform)(hidden, targets, weights)
    torch.testing.assert_close(loss, expected)
    wanted = [hidden, head.weight, head.bias]
    for grad, expected_grad in zip(
        torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)


def without_entries(targets: LossTargets) -> LossTargets:
    top = targets.top
    return replace(targets, top=TopK(top.ids[:, :0], top.probs[:, :0].float(), top.tail))


def test_without_entries_the_loss_is_plain_cross_entropy():
    torch.manual_seed(3)
    head = nn.Linear(WIDTH, VOCAB, dtype=torch.float64)
    hidden = torch.randn(POSITIONS, WIDTH, dtype=torch.float64)
    targets = without_entries(random_targets())
    expected = nn.functional.cross_entropy(head(hidden), targets.next_ids)
    weights = LossWeights(scale=1 / POSITIONS, clm=1.0)
    loss, sums = make_head(TrainSettings(), head)(hidden, targets, weights)
    torch.testing.assert_close(loss, expected)
    assert not sums[1:].any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("heat", [1.0, 2.5])
def test_entries_without_a_signal_do_not_change_the_loss(divergence, heat):
    torch.manual_seed(3)
    head = nn.Linear(WIDTH, VOCAB, dtype=torch.float64)
    hidden = torch.randn(POSITIONS, WIDTH, dtype=torch.float64, requires_grad=True)
    targets = random_targets()
    targets = replace(targets, sources=torch.full_like(targets.sources, -1))
    expected = nn.functional.cross_entropy(head(hidden), targets.next_ids)
    weights = LossWeights(1 / POSITIONS, 0.3, heat)
    loss, sums = make_head(TrainSettings(divergence=divergence), head)(hidden, targets, weights)
    torch.testing.assert_close(loss, expected)
    assert not sums[1:].any()
    wanted = [hidden, head.weight, head.bias]
    for grad, other in zip(
        torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        torch.testing.assert_close(grad, other)


def test_no_positions_at_all_have_no_loss():
    head = nn.Linear(WIDTH, VOCAB)
    hidden = torch.randn(0, WIDTH, requires_grad=True)
    targets = random_targets().take(slice(0, 0))
    loss, sums = make_head(TrainSettings(), head)(hidden, targets, LossWeights(1.0, 0.5))
    loss.backward()
    assert loss == 0
    assert not sums.any()
    assert hidden.grad is not None
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("heat", [1.0, 3.0])
def test_a_target_equal_to_the_fused_distribution_has_no_divergence(divergence, heat):
    head = nn.Linear(WIDTH, VOCAB, dtype=torch.float64)
    hidden = torch.randn(1, WIDTH, dtype=torch.float64)
    top = head(hidden).softmax(1).topk(ENTRIES)
    targets = LossTargets(
        next_ids=torch.tensor([0]),
        sources=torch.tensor([0]),
        top=TopK(top.indices, top.values.detach(), 1 - top.values.detach().sum(1)),
    )
    layer = make_head(TrainSettings(divergence=divergence), head)
    _, sums = layer(hidden, targets, LossWeights(1.0, 0.0, heat))
    assert abs(float(sums[1])) < 1e-12


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("heat", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["sharp", "masked", "uniform", "one_hot"])
def test_extremes_give_finite_losses_and_gradients_in_float32(divergence, heat, kind):
    torch.manual_seed(4)
    head = nn.Linear(WIDTH, VOCAB)
    hidden = torch.randn(POSITIONS, WIDTH, requires_grad=True)
    targets = random_targets()
    top = TopK(targets.top.ids, targets.top.probs.float(), targets.top.tail.float())
    targets = replace(targets, top=top)
    with torch.no_grad():
        if kind == "sharp":
            head.weight.mul_(400)
        if kind == "uniform":
            head.weight.zero_()
            head.bias.zero_()
        if kind == "masked":  # log-probability -inf of a token that the sources think likely
            unseen = set(range(VOCAB)) - set(targets.next_ids.tolist())
            head.bias[list(unseen)] = -math.inf
        if kind == "one_hot":
            top.probs.copy_(torch.eye(ENTRIES)[0].expand_as(top.probs))
            top.tail.zero_()
    layer = make_head(TrainSettings(divergence=divergence), head)
    loss, sums = layer(hidden, targets, LossWeights(0.1, 0.5, heat))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(sums).all()
    for grad in (hidden.grad, head.weight.grad):
        assert grad is not None
        assert torch.isfinite(grad).all()


def test_in_bfloat16_the_gradients_are_those_of_float32_to_its_precision():
    torch.manual_seed(5)
    head = nn.Linear(WIDTH, VOCAB, dtype=torch.bfloat16)
    hidden = torch.randn(POSITIONS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    targets = random_targets()
    weights = LossWeights(1 / POSITIONS, 0.5)
    wide = nn.Linear(WIDTH, VOCAB)
    wide.load_state_dict(head.state_dict())
    wide_hidden = hidden.detach().float().requires_grad_()
    make_head(TrainSettings(), wide)(wide_hidden, targets, weights)[0].backward()
    make_head(TrainSettings(), head)(hidden, targets, weights)[0].backward()
    assert wide.weight.grad is not None
    assert head.weight.grad is not None
    spread = float(wide.weight.grad.abs().max())
    assert float((head.weight.grad.float() - wide.weight.grad).abs().max()) < 0.02 * spread
