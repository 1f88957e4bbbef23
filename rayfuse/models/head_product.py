"""A head's product with hidden states, in float32 however narrow the two are, and its normaliser.

A product in bfloat16 is rounded to 8 bits of mantissa: errors of several hundredths of a nat at
large logits. The products of two half-precision numbers are exact in float32, so it suffices to add
them up in float32 and to keep the sum.
"""

import torch
from jaxtyping import Float
from torch import nn

from rayfuse.models.placement import only_moves_inputs

CPU_CHUNK_BYTES = 16 << 20
"""Of the head's weights that are converted to float32 at a time."""

CPU_NORMALISED_POSITIONS = 64
"""Positions that are exponentiated at a time: their exponentials are a copy."""


def is_plain(head: nn.Linear) -> bool:
    """Check that a head's output is the product with its weight, as it lies in memory.

    Quantised weights are of other classes; hooks that load or unpack weights replace `forward`. One
    of a device map that moves the inputs alone does so, too, and counts as plain.
    """
    is_hooked = "forward" in vars(head) and not (
        hasattr(head, "_hf_hook") and only_moves_inputs(head)
    )
    is_own = type(head.weight) in (torch.Tensor, nn.Parameter) and not is_hooked
    return type(head).forward is nn.Linear.forward and is_own


def multiply_head(
    hidden: Float[torch.Tensor, "positions width"],
    weight: Float[torch.Tensor, "vocab width"],
    bias: Float[torch.Tensor, " vocab"] | None,
) -> Float[torch.Tensor, "positions vocab"]:
    """Compute hidden @ weight.T + bias in float32 (or wider), for use without gradients."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.dtype == wide == weight.dtype:
        return nn.functional.linear(hidden, weight, bias)
    if hidden.is_cuda:
        product = torch.mm(hidden, weight.T, out_dtype=wide)
    else:
        product = _multiply_in_chunks(hidden.to(wide), weight)
    return product if bias is None else product.add_(bias)


def log_normaliser(
    logits: Float[torch.Tensor, "positions vocab"],
) -> Float[torch.Tensor, "positions 1"]:
    """Compute log sum exp over the vocabulary, without a second copy of the logits on a CPU."""
    if logits.is_cuda:
        return logits.logsumexp(1, keepdim=True)
    parts = [part.logsumexp(1, keepdim=True) for part in logits.split(CPU_NORMALISED_POSITIONS)]
    return torch.cat(parts)


def _multiply_in_chunks(
    hidden: Float[torch.Tensor, "positions width"], weight: Float[torch.Tensor, "vocab width"]
) -> Float[torch.Tensor, "positions vocab"]:
    """Convert the weights a part at a time: all of them could be the model's largest tensor."""
    product = hidden.new_empty(len(hidden), len(weight))
    rows = max(CPU_CHUNK_BYTES // (hidden.element_size() * hidden.shape[1]), 1)
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        product[:, part] = hidden @ weight[part].to(hidden.dtype).T
    return product
