"""A head's product in half precision is as exact as its inputs allow."""

import pytest
import torch
from torch import nn

from rayfuse.models import head_product
from rayfuse.models.causal_lm import CausalLM
from rayfuse.models.head_product import is_plain, multiply_head


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_a_gpu_keeps_the_float32_sum():
    hidden, head = make_head(torch.bfloat16)
    exact = hidden.double() @ head.weight.double().T + head.bias.double()
    product = multiply_head(hidden.cuda(), head.weight.cuda(), head.bias.cuda())
    assert (product.cpu() - exact).abs().max() < 1e-3
    assert multiply_head(hidden[:0].cuda(), head.weight.cuda(), None).shape == (0, 1000)


class OnGpu(torch.Tensor):
    """Hidden states that say they are on a GPU."""

    is_cuda = True


@torch.no_grad()
def test_the_product_on_a_gpu_is_asked_for_in_float32(monkeypatch):
    hidden, head = make_head(torch.bfloat16)

    def multiply(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        return torch.matmul(a.as_subclass(torch.Tensor).to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(torch, "mm", multiply)
    product = multiply_head(hidden.as_subclass(OnGpu), head.weight, head.bias)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product, multiply_head(hidden, head.weight, head.bias))


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


@torch.no_grad()
def test_a_head_whose_forward_is_replaced_computes_its_own_product():
    hidden, head = make_head(torch.bfloat16)
    assert is_plain(head)
    head.forward = lambda input: torch.zeros(len(input), 1000)  # as a hook does
    assert not is_plain(head)
    assert not CausalLM(head, head, head).logits(hidden).any()
