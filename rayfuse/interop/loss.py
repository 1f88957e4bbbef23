"""The loss of rayfuse's own trainer as a plain function."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import nn

from rayfuse.config.base import UserError
from rayfuse.config.train import TrainSettings
from rayfuse.interop.batch import IGNORED
from rayfuse.models.causal_lm import LogitTransform, read_transform
from rayfuse.models.head_product import is_plain
from rayfuse.storage.codec import TopK
from rayfuse.train.divergence import DIVERGENCES
from rayfuse.train.loss import LossTargets, LossWeights, build_form, compute_loss

TARGETS = ("labels", "top_ids", "top_probs", "tail_probs", "sources")


def fusion_loss(
    hidden: Float[torch.Tensor, "batch seq_len width"],
    head: nn.Module,
    targets: Mapping[str, torch.Tensor],
    *,
    clm_weight: float = 0.9,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    skew: float = 0.1,
    num_positions: Any = None,
) -> Float[torch.Tensor, ""]:
    """Compute lambda * CLM + (1 - lambda) * D(fused || target), the mean over positions, in nats.

    Where no source has a signal, it is CLM alone. The logits exist for a few positions at a time,
    also in the backward pass, which can be run once.

    Args:
        hidden: The last hidden states, the head's inputs.
        head: The model that they are of (one of `transformers`), whose head it has, with scaled
            and capped logits where it does so; or a head alone, a `torch.nn.Linear`.
        targets: A batch of `rayfuse.collate`, on the same device.
        clm_weight: lambda.
        divergence: D, as `train.divergence`.
        temperature: Of D.
        skew: As `train.skew`. With the three before it, it is in `RowDataset.loss_settings`.
        num_positions: What the sum is divided by; by default the positions of the batch that are
            learned. Several micro-batches of a step need their common number.

    Raises:
        UserError: A target is missing or has another shape than the hidden states, a setting is
            wrong, or the head is not a plain linear layer.
    """
    _check_shapes(hidden, targets)
    linear, transform = _find_head(head)
    _check_settings(clm_weight, divergence, temperature, skew)
    settings = TrainSettings.model_validate({"divergence": divergence, "skew": skew})
    form = build_form(linear, transform, settings, num_sources=1)
    following = targets["labels"][:, 1:]
    is_learned = following != IGNORED
    entries = targets["top_ids"].shape[2] if clm_weight < 1 else 0

    def select(name: str) -> torch.Tensor:
        return targets[name][:, :-1][is_learned]

    learned = LossTargets(
        next_ids=following[is_learned].long(),
        sources=(select("sources") >= 0).long() - 1,  # 0 with a signal, by whatever source
        top=TopK(
            ids=select("top_ids")[:, :entries].long(),
            probs=select("top_probs")[:, :entries],
            tail=select("tail_probs"),
        ),
    )
    count = len(learned.next_ids) if num_positions is None else float(num_positions)
    weights = LossWeights(scale=1 / max(count, 1), clm=clm_weight, temperature=temperature)
    flat = hidden[:, :-1][is_learned]
    return compute_loss(flat, (linear.weight, linear.bias), learned, weights, form)[0]


def _check_settings(clm_weight: float, divergence: str, temperature: float, skew: float) -> None:
    if divergence not in DIVERGENCES:
        known = ", ".join(DIVERGENCES)
        raise UserError(f"divergence is {divergence!r}; the divergences are {known}")
    if not 0 <= clm_weight <= 1:
        raise UserError(f"clm_weight is {clm_weight}; it is between 0 and 1")
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}; it is above 0")
    if not 0 < skew < 1:
        raise UserError(f"skew is {skew}; it is between 0 and 1, both excluded")


def _check_shapes(hidden: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> None:
    missing = [name for name in TARGETS if name not in targets]
    if missing:
        raise UserError(f"targets lack {', '.join(missing)}; give a batch of rayfuse.collate")
    shapes = {name: tuple(targets[name].shape[:2]) for name in TARGETS}
    for name, shape in shapes.items():
        if shape != tuple(hidden.shape[:2]):
            raise UserError(
                f"targets[{name!r}] is of {shape} tokens, but hidden of {tuple(hidden.shape[:2])}; "
                "give the hidden states of all tokens of the batch"
            )


def _find_head(head: Any) -> tuple[nn.Linear, LogitTransform]:
    """Find the linear layer, and how its outputs become logits."""
    transform = LogitTransform()
    if hasattr(head, "get_output_embeddings"):
        transform, head = read_transform(head.config), head.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not is_plain(head):
        raise UserError(
            f"head is a {type(head).__name__}, but the loss needs a plain torch.nn.Linear, or the "
            "model of transformers that has one"
        )
    return head, transform
