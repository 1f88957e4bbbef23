"""A head's product in half precision is as exact as its inputs allow."""

import pytest
import torch
from torch import nn

from rayfuse.models import head_product
from rayfuse.models.causal_lm import CausalLM
from rayfuse.models.head_product import multiply_head


def make_head(dtype: torch.dtype) -> tuple[torch.Tensor, nn.Linear]:
    """Make hidden states and a head with logits of up to about 50, as large models have."""
    torch.manual_seed(0)
    head = nn.Linear(256, 1000).to(dtype)
    with torch.no_grad():
        head.weight.normal_(0, 0.8)
    return torch.randn(64, 256).to(dtype), head


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_bytes", [1, 100_000, 1 << 30])
@torch.no_grad()
def test_half_precision_is_summed_and_kept_in_float32(dtype, chunk_bytes, monkeypatch):
    monkeypatch.setattr(head_product, "CPU_CHUNK_BYTES", chunk_bytes)
    hidden, head = make_head(dtype)
    exact = hidden.double() @ head.weight.double().T + head.bias.double()
    product = multiply_head(hidden, head.weight, head.bias)
    assert product.dtype == torch.float32
    error = (product - exact).abs().max()
    assert error < 1e-4
    assert (head(hidden) - exact).abs().max() > 100 * error  # of the library's product
    without_bias = multiply_head(hidden, head.weight, None)
    torch.testing.assert_close(without_bias + head.bias, product)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_float32_and_wider_are_the_librarys_product(dtype):
    hidden, head = make_head(dtype)
    assert torch.equal(multiply_head(hidden, head.weight, head.bias), head(hidden))


@torch.no_grad()
def test_the_product_for_gpus_is_asked_for_in_float32():
    head = nn.Linear(8, 5, bias=False, device="meta", dtype=torch.bfloat16)
    hidden = torch.empty(3, 8, device="meta", dtype=torch.bfloat16)
    product = torch.mm(hidden, head.weight.T, out_dtype=torch.float32)
    assert (product.dtype, product.shape) == (torch.float32, (3, 5))


class PackedHead(nn.Linear):
    """A head whose weight is not what its product is with, as a quantised one's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@torch.no_grad()
def test_a_head_of_another_class_computes_its_own_product():
    hidden, _ = make_head(torch.bfloat16)
    head = PackedHead(256, 10).to(torch.bfloat16)
    logits = CausalLM(head, head, head).logits(hidden)
    assert torch.equal(logits, head(hidden).float())
