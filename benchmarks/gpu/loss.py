"""Memory, time and exactness of the loss and of the head's product at large vocabularies."""

from importlib.util import find_spec

import torch
from torch import nn

from benchmarks.gpu.session import UnavailableError
from benchmarks.half_precision import compare_products
from benchmarks.loss_memory import FORMS, make_inputs, make_targets, measure_form
from benchmarks.timing import time_interleaved
from rayfuse.config.train import TrainSettings
from rayfuse.models.causal_lm import CausalLM
from rayfuse.train.loss import HeadLoss, LossWeights

LOGIT_SPREAD = 4.0
"""Standard deviation of the logits, about that of real models: errors grow with their size."""

MAX_PRODUCT_ERROR = 1e-3
"""Nats by which a float32 product may differ from float64; one in bfloat16 is wrong by 0.1."""


def compare_loss(
    other: str, device: str, tokens: int, vocab: int, width: int, rounds: int
) -> dict[str, float]:
    """Measure peak memory and time of the loss over those of another form."""
    if other == "liger" and (find_spec("liger_kernel") is None or device == "cpu"):
        raise UnavailableError("liger-kernel is not installed, or there is no GPU")
    place = torch.device(device)
    inputs = make_inputs(tokens, vocab, width, place)
    peaks = {form: measure_form(form, inputs) for form in ("rayfuse", other)}
    timings = time_interleaved(
        {form: lambda form=form: FORMS[form](inputs).backward() for form in peaks},
        place,
        rounds=rounds,
    )
    return {
        "memory_ratio": peaks["rayfuse"] / peaks[other],
        "time_ratio": timings.ratio("rayfuse", other),
        "mib": peaks["rayfuse"] / 2**20,
        f"mib_{other}": peaks[other] / 2**20,
        "seconds": timings.median("rayfuse"),
        f"seconds_{other}": timings.median(other),
    }


def draw_head(width: int, vocab: int, device: torch.device) -> CausalLM:
    """Draw a head in bfloat16 whose logits are as large as those of real models."""
    torch.manual_seed(0)
    head = nn.Linear(width, vocab, bias=False, device=device, dtype=torch.bfloat16)
    nn.init.normal_(head.weight, std=LOGIT_SPREAD / width**0.5)
    return CausalLM(nn.Identity(), nn.Identity(), head)


def measure_products(device: str, positions: int, width: int, vocab: int) -> dict[str, float]:
    """Measure the errors of the head's product in bfloat16 and in float32, against float64.

    Raises:
        ArithmeticError: The float32 product is not exact: records and losses would be wrong.
    """
    place = torch.device(device)
    lm = draw_head(width, vocab, place)
    hidden = torch.randn(positions, width, device=place, dtype=torch.bfloat16)
    following = torch.randint(vocab, (positions,), device=place)
    found = compare_products(hidden, lm, following)
    exact, narrow = found["float32"], found["bfloat16"]
    error = "max error of next token (nats)"
    if exact[error] > MAX_PRODUCT_ERROR:
        raise ArithmeticError(f"the float32 product is wrong by {exact[error]:.3g} nats")
    return {
        "time_ratio": exact["seconds"] / narrow["seconds"],
        **{f"float32: {name}": value for name, value in exact.items()},
        **{f"bfloat16: {name}": value for name, value in narrow.items()},
    }


def measure_gradients(device: str, positions: int, width: int, vocab: int) -> dict[str, float]:
    """Measure the errors of the loss and its gradients in bfloat16, against float64.

    Errors of gradients are relative, in the Frobenius norm; bfloat16 alone rounds by up to 0.004.
    """
    place = torch.device(device)
    lm = draw_head(width, vocab, place)
    hidden = torch.randn(positions, width, device=place, dtype=torch.bfloat16)
    targets = make_targets(positions, vocab, place)
    weights, found = LossWeights(1 / positions, 0.5), []
    for dtype in (torch.bfloat16, torch.float64):
        head = nn.Linear(width, vocab, bias=False, device=place, dtype=dtype)
        head.weight.data.copy_(lm.head.weight)
        states = hidden.to(dtype, copy=True).requires_grad_()
        layer = HeadLoss(
            CausalLM(nn.Identity(), nn.Identity(), head), TrainSettings(), num_sources=1
        )
        loss, _ = layer(states, targets, weights)
        loss.backward()
        assert states.grad is not None and head.weight.grad is not None
        found.append((loss.detach(), states.grad, head.weight.grad))
    errors = [
        float((narrow.double() - exact).norm() / exact.norm())
        for narrow, exact in zip(*found, strict=True)
    ]
    names = ("loss_error", "hidden_gradient_error", "weight_gradient_error")
    return dict(zip(names, errors, strict=True))
