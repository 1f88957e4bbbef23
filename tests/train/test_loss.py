from dataclasses import replace

import pytest
import torch
from torch import nn

from rayfuse.train.loss import HeadLoss, LossScales, LossTargets

POSITIONS, WIDTH, VOCAB, ENTRIES = 11, 6, 13, 4


def random_targets(seed: int = 0) -> LossTargets:
    """Fused heads of 4, 3 (the first or last entry missing) or 0 tokens; a tail everywhere."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack(
        [torch.randperm(VOCAB, generator=generator)[:ENTRIES] for _ in range(POSITIONS)]
    )
    probs = torch.rand(POSITIONS, ENTRIES + 1, generator=generator, dtype=torch.float64) + 0.01
    ids[2, -1], probs[2, ENTRIES - 1] = -1, 0.0
    ids[3, 0], probs[3, 0] = -1, 0.0
    ids[4], probs[4, :ENTRIES] = -1, 0.0
    probs /= probs.sum(1, keepdim=True)
    has_signal = torch.ones(POSITIONS, dtype=torch.bool)
    has_signal[5:7] = False
    ids[6] = -1
    return LossTargets(
        next_ids=torch.randint(VOCAB, (POSITIONS,), generator=generator),
        has_signal=has_signal,
        top_ids=ids,
        top_probs=probs[:, :ENTRIES],
        tail_probs=probs[:, ENTRIES],
    )


def dense_loss(logits: torch.Tensor, targets: LossTargets, clm_weight: float) -> torch.Tensor:
    """The loss written out with full distributions, one position at a time."""
    logprobs = logits.log_softmax(1)
    clm = nn.functional.nll_loss(logprobs, targets.next_ids)
    divergences = []
    for t in targets.has_signal.nonzero()[:, 0].tolist():
        in_head = torch.zeros(VOCAB, dtype=torch.bool)
        divergence = torch.zeros((), dtype=logits.dtype)
        for token, p in zip(targets.top_ids[t].tolist(), targets.top_probs[t], strict=True):
            if token >= 0:
                in_head[token] = True
                divergence = divergence + p * (p.log() - logprobs[t, token])
        tail = targets.tail_probs[t]
        tail_logprob = logprobs[t][~in_head].logsumexp(0)
        divergences.append(divergence + tail * (tail.log() - tail_logprob))
    return clm_weight * clm + (1 - clm_weight) * torch.stack(divergences).mean()


def our_loss(
    head: nn.Linear, hidden: torch.Tensor, targets: LossTargets, clm_weight: float, chunk: int
) -> torch.Tensor:
    scales = LossScales(
        clm=clm_weight / POSITIONS, fusion=(1 - clm_weight) / int(targets.has_signal.sum())
    )
    return HeadLoss(head, chunk)(hidden, targets, scales)[0]


@pytest.mark.parametrize("clm_weight", [0.9, 0.0, 1.0])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_loss_and_gradients_equal_the_dense_formula(clm_weight, has_bias, chunk):
    torch.manual_seed(1)
    head = nn.Linear(WIDTH, VOCAB, bias=has_bias, dtype=torch.float64)
    hidden = torch.randn(POSITIONS, WIDTH, dtype=torch.float64, requires_grad=True)
    targets = random_targets()
    wanted = [hidden, *head.parameters()]
    expected = dense_loss(head(hidden), targets, clm_weight)
    expected_grads = torch.autograd.grad(expected, wanted)
    loss = our_loss(head, hidden, targets, clm_weight, chunk)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for grad, expected_grad in zip(torch.autograd.grad(loss, wanted), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)


def test_a_head_tied_to_the_embedding_gets_both_gradients():
    torch.manual_seed(2)
    embedding = nn.Embedding(VOCAB, WIDTH, dtype=torch.float64)
    head = nn.Linear(WIDTH, VOCAB, bias=False, dtype=torch.float64)
    head.weight = embedding.weight
    body = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    targets = random_targets()
    ids = torch.arange(POSITIONS) % VOCAB

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, embedding.weight)[0]

    expected = gradient(dense_loss(head(body(embedding(ids)).tanh()), targets, 0.9))
    ours = gradient(our_loss(head, body(embedding(ids)).tanh(), targets, 0.9, 4))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_without_entries_the_loss_is_plain_cross_entropy():
    torch.manual_seed(3)
    head = nn.Linear(WIDTH, VOCAB, dtype=torch.float64)
    hidden = torch.randn(POSITIONS, WIDTH, dtype=torch.float64)
    targets = random_targets()
    bare = replace(
        targets,
        has_signal=torch.zeros(POSITIONS, dtype=torch.bool),
        top_ids=targets.top_ids[:, :0],
        top_probs=targets.top_probs[:, :0],
    )
    expected = nn.functional.cross_entropy(head(hidden), targets.next_ids)
    loss, sums = HeadLoss(head, 4)(hidden, bare, LossScales(clm=1 / POSITIONS, fusion=0.5))
    torch.testing.assert_close(loss, expected)
    assert sums[1] == 0


def test_a_target_that_says_what_the_sources_say_has_no_divergence():
    head = nn.Linear(WIDTH, VOCAB, dtype=torch.float64)
    hidden = torch.randn(1, WIDTH, dtype=torch.float64)
    top = head(hidden).softmax(1).topk(ENTRIES)
    targets = LossTargets(
        next_ids=torch.tensor([0]),
        has_signal=torch.tensor([True]),
        top_ids=top.indices,
        top_probs=top.values.detach(),
        tail_probs=1 - top.values.detach().sum(1),
    )
    _, sums = HeadLoss(head, 4)(hidden, targets, LossScales(clm=0.0, fusion=1.0))
    assert abs(float(sums[1])) < 1e-12


def test_an_almost_empty_tail_gives_finite_gradients_in_float32():
    head = nn.Linear(WIDTH, VOCAB)
    with torch.no_grad():
        head.weight.mul_(200)
    hidden = torch.randn(POSITIONS, WIDTH, requires_grad=True)
    targets = random_targets()
    targets = replace(
        targets, top_probs=targets.top_probs.float(), tail_probs=targets.tail_probs.float()
    )
    loss = our_loss(head, hidden, targets, 0.5, 4)
    loss.backward()
    assert torch.isfinite(loss)
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()
