"""The target LLM as one module, from token ids to the fused loss."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rayfuse.config.base import UserError
from rayfuse.config.train import LoraSettings, TrainSettings
from rayfuse.models.causal_lm import CausalLM
from rayfuse.storage.codec import TopK
from rayfuse.train.batches import MicroBatch
from rayfuse.train.loss import HeadLoss, LossTargets, LossWeights


class FusionModel(nn.Module):
    """A target LLM with the loss as its output."""

    def __init__(
        self,
        lm: CausalLM,
        settings: TrainSettings,
        *,
        num_sources: int,
    ) -> None:
        """Wrap a target, with LoRA adapters if `train.lora` is set.

        Args:
            lm: The target; its weights are trained in place.
            settings: The training settings.
            num_sources: Sources by which the fusion loss is reported.
        """
        super().__init__()
        if settings.lora is not None:
            lm = replace(lm, model=add_adapters(lm.model, settings.lora))
        self.model = lm.model
        self.lm = [lm]  # in a list, or torch would register its body and head a second time
        self.head_loss = HeadLoss(
            lm,
            settings,
            num_sources=num_sources,
            chunk_positions=settings.chunk_positions,
        )

    def forward(self, batch: MicroBatch, weights: LossWeights) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the scaled loss, and unscaled sums in nats: CLM, then D by source."""
        lm = self.lm[0]
        device = self.head_loss.weight.device

        def move(array: Any) -> torch.Tensor:
            tensor = torch.from_numpy(array)
            tensor = tensor.pin_memory() if device.type == "cuda" else tensor
            tensor = tensor.to(device, non_blocking=True)
            return tensor.long() if tensor.dtype in (torch.int32, torch.int16) else tensor

        position_ids = None if batch.position_ids is None else move(batch.position_ids)
        hidden = lm.hidden_states(move(batch.token_ids), position_ids)
        top, is_fused = (
            batch.top,
            weights.clm < 1,
        )  # else the entries are not even copied to the device
        targets = LossTargets(
            next_ids=move(batch.next_ids),
            sources=move(batch.sources),
            top=TopK(
                ids=move(top.ids if is_fused else top.ids[:, :0]),
                probs=move(top.probs if is_fused else top.probs[:, :0]),
                tail=move(top.tail),
            ),
        )
        return self.head_loss(hidden.flatten(0, 1)[move(batch.positions)], targets, weights)


def add_adapters(model: nn.Module, settings: LoraSettings) -> nn.Module:
    """Add low-rank adapters (LoRA, arXiv 2106.09685); only they are trained.

    Raises:
        UserError: peft is not installed, or the model has no layers of the names in
            `train.lora.modules`.
    """
    try:
        from peft import LoraConfig, get_peft_model  # optional: rayfuse[lora]
    except ImportError as error:
        raise UserError("train.lora needs peft; pip install 'rayfuse[lora]'") from error
    modules = settings.modules
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=settings.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise UserError(f"train.lora.modules is {modules!r}: {error}") from error
