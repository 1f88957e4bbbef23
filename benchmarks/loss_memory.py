"""Peak memory of the loss and its backward pass, beside the dense form and the library's own.

    python benchmarks/loss_memory.py [--tokens N] [--vocab N] [--width N] [--json]

Each form runs in a process of its own, on hidden states and a head's weight that are there already;
counted is what the process holds at most beyond that (resident memory of a CPU, allocations of a
GPU). Dense: fused distributions as [tokens, vocabulary], log-softmax of the logits, cross-entropy
and KL divergence, autograd. The library's: the cross-entropy of transformers' causal LLMs alone.
"""

import argparse
import json
import resource
import subprocess
import sys

import torch
from torch import nn

from rayfuse.config.train import TrainSettings
from rayfuse.models.causal_lm import CausalLM
from rayfuse.storage.codec import TopK
from rayfuse.train.loss import HeadLoss, LossTargets, LossWeights

ENTRIES = 16
MAX_OF_DENSE, MAX_OF_LIBRARY = 0.15, 0.5
FORMS = ("ours", "dense", "library")


def make_targets(tokens: int, vocab: int, device: str) -> LossTargets:
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


def read_peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(form: str, tokens: int, vocab: int, width: int) -> int:
    """Return the bytes that one form takes at its peak, beyond its inputs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    head = nn.Linear(width, vocab, bias=False, device=device, dtype=dtype)
    hidden = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    targets = make_targets(tokens, vocab, device)
    (head(hidden[:1]).sum() * 0).backward()  # gradients are there, and so are the libraries
    before = read_peak(device)
    if form == "ours":
        lm = CausalLM(nn.Identity(), nn.Identity(), head)
        layer = HeadLoss(lm, TrainSettings(), num_sources=1)
        loss, _ = layer(hidden, targets, LossWeights(1 / tokens, 0.5))
    elif form == "library":
        from transformers.loss.loss_utils import ForCausalLMLoss

        logits = head(hidden)[None]
        loss = ForCausalLMLoss(logits, None, vocab_size=vocab, shift_labels=targets.next_ids[None])
    else:
        dense = torch.zeros(tokens, vocab, device=device)
        dense.scatter_(1, targets.top.ids, targets.top.probs)
        dense += targets.top.tail[:, None] / vocab
        logprobs = head(hidden).float().log_softmax(1)
        loss = nn.functional.nll_loss(logprobs, targets.next_ids) / 2
        loss = loss + nn.functional.kl_div(logprobs, dense, reduction="batchmean") / 2
    loss.backward()
    return read_peak(device) - before


def run_apart(form: str, options: argparse.Namespace) -> int:
    sizes = [f"--tokens={options.tokens}", f"--vocab={options.vocab}", f"--width={options.width}"]
    command = [sys.executable, __file__, f"--form={form}", *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--form", choices=FORMS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.form:
        print(measure(options.form, options.tokens, options.vocab, options.width))
        return
    peaks = {form: run_apart(form, options) for form in FORMS}
    of_dense, of_library = (peaks["ours"] / peaks[form] for form in ("dense", "library"))
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
