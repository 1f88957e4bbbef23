"""Peak memory of the loss and its backward pass, beside the dense form and the library's own.

    python -m benchmarks.loss_memory [--tokens N] [--vocab N] [--width N] [--json]

Counted are the bytes that PyTorch's allocator holds at most beyond hidden states, the head's weight
and their gradients, which are there already. Dense: fused distributions as [tokens, vocabulary],
log-softmax of the logits, cross-entropy and KL divergence, autograd. Library: the cross-entropy of
transformers' causal LLMs alone. Liger: the fused cross-entropy of liger-kernel alone, on a GPU
where it is installed.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers.loss.loss_utils import ForCausalLMLoss

from rayfuse.config.train import TrainSettings
from rayfuse.models.causal_lm import CausalLM
from rayfuse.storage.codec import TopK
from rayfuse.train.loss import HeadLoss, LossTargets, LossWeights

ENTRIES = 16
MAX_OF_DENSE, MAX_OF_LIBRARY = 0.15, 0.5


@dataclass(frozen=True)
class LossInputs:
    """What every form computes its loss from."""

    head: nn.Linear
    hidden: torch.Tensor
    targets: LossTargets


def make_inputs(tokens: int, vocab: int, width: int, device: torch.device) -> LossInputs:
    """Draw hidden states, a head and targets, bfloat16 on a GPU; their gradients exist."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    head = nn.Linear(width, vocab, bias=False, device=device, dtype=dtype)
    hidden = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    (head(hidden[:1]).sum() * 0).backward()
    return LossInputs(head, hidden, make_targets(tokens, vocab, device))


def make_targets(tokens: int, vocab: int, device: torch.device) -> LossTargets:
    """Draw the next tokens and fused distributions."""
    probs = torch.rand(tokens, ENTRIES + 1, device=device)
    probs /= probs.sum(1, keepdim=True)
    ids = torch.randint(vocab // ENTRIES, (tokens, ENTRIES), device=device)
    return LossTargets(
        next_ids=torch.randint(vocab, (tokens,), device=device),
        sources=torch.zeros(tokens, dtype=torch.long, device=device),
        top=TopK(
            ids=ids + torch.arange(ENTRIES, device=device) * (vocab // ENTRIES),
            probs=probs[:, :ENTRIES],
            tail=probs[:, ENTRIES],
        ),
    )


def compute_rayfuse(inputs: LossInputs) -> torch.Tensor:
    """Compute the loss of training: cross-entropy and KL divergence, chunk by chunk."""
    lm = CausalLM(nn.Identity(), nn.Identity(), inputs.head)
    layer = HeadLoss(lm, TrainSettings(), num_sources=1)
    return layer(inputs.hidden, inputs.targets, LossWeights(1 / len(inputs.hidden), 0.5))[0]


def compute_dense(inputs: LossInputs) -> torch.Tensor:
    """Compute the same of full logits and distributions; the tail is spread evenly."""
    targets, vocab = inputs.targets, inputs.head.out_features
    dense = torch.zeros(len(inputs.hidden), vocab, device=inputs.hidden.device)
    dense.scatter_(1, targets.top.ids, targets.top.probs)
    dense += targets.top.tail[:, None] / vocab
    logprobs = inputs.head(inputs.hidden).float().log_softmax(1)
    loss = nn.functional.nll_loss(logprobs, targets.next_ids) / 2
    return loss + nn.functional.kl_div(logprobs, dense, reduction="batchmean") / 2


def compute_library(inputs: LossInputs) -> torch.Tensor:
    """Compute the cross-entropy of transformers' causal LLMs, of full logits."""
    labels, vocab = inputs.targets.next_ids[None], inputs.head.out_features
    logits: Any = inputs.head(inputs.hidden)[None]
    return ForCausalLMLoss(logits, None, vocab_size=vocab, shift_labels=labels)


def compute_liger(inputs: LossInputs) -> torch.Tensor:
    """Compute the cross-entropy by a kernel that never holds the full logits."""
    fused = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return fused(inputs.head.weight, inputs.hidden, inputs.targets.next_ids)


FORMS: dict[str, Callable[[LossInputs], torch.Tensor]] = {
    "rayfuse": compute_rayfuse,
    "dense": compute_dense,
    "library": compute_library,
    "liger": compute_liger,
}


def measure_peak(compute: Callable[[], Any], device: torch.device) -> int:
    """Measure the bytes that a computation allocates at most, beyond those allocated before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        compute()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        compute()
    results: Any = profiler.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    peak = held = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure_form(form: str, inputs: LossInputs) -> int:
    """Measure the peak of one form's loss and backward pass."""
    return measure_peak(lambda: FORMS[form](inputs).backward(), inputs.hidden.device)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = make_inputs(options.tokens, options.vocab, options.width, device)
    peaks = {form: measure_form(form, inputs) for form in ("rayfuse", "dense", "library")}
    of_dense, of_library = (peaks["rayfuse"] / peaks[form] for form in ("dense", "library"))
    holds = of_dense <= MAX_OF_DENSE and of_library <= MAX_OF_LIBRARY
    result = {
        "value": of_dense,
        "unit": "peak memory over the dense form's",
        "bar": MAX_OF_DENSE,
        "holds": holds,
        "over_library": of_library,
        "bar_over_library": MAX_OF_LIBRARY,
        "mib": {form: round(peak / 2**20) for form, peak in peaks.items()},
    }
    if options.json:
        print(json.dumps(result))
        return
    for form, peak in peaks.items():
        print(f"{form:8} {peak / 2**20:8,.0f} MiB")
    print(f"over dense {of_dense:.3f} (bar {MAX_OF_DENSE}), over the library's {of_library:.3f}")


if __name__ == "__main__":
    main()
