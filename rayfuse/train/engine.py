"""The target as a DeepSpeed engine: one module from token ids to the fused loss."""

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from rayfuse.models import CausalLM
from rayfuse.recipe import TrainSettings
from rayfuse.train.feed import MicroBatch
from rayfuse.train.loss import HeadLoss, LossScales, LossTargets


class FusionModel(nn.Module):
    """A target LLM whose forward pass is the loss."""

    def __init__(self, lm: CausalLM, chunk_positions: int) -> None:
        super().__init__()
        self.model = lm.model
        self.lm = [lm]  # in a list: its body and head are modules of `model` already
        self.head_loss = HeadLoss(lm.head, chunk_positions)

    def forward(self, batch: MicroBatch, scales: LossScales) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scaled loss, and the plain sums of CLM and fusion loss in nats."""
        lm = self.lm[0]
        device = self.head_loss.weight.device

        def move(array: Any) -> torch.Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        hidden = lm.hidden_states(move(batch.token_ids))
        targets = LossTargets(
            next_ids=move(batch.next_ids),
            has_signal=move(batch.has_signal),
            top_ids=move(batch.top_ids),
            top_probs=move(batch.top_probs),
            tail_probs=move(batch.tail_probs),
        )
        return self.head_loss(hidden.flatten(0, 1)[move(batch.positions)], targets, scales)


def build_engine(
    model: FusionModel, settings: TrainSettings, *, num_steps: int, num_workers: int, device: str
) -> Any:
    """Return the DeepSpeed engine that trains a model; the process group must be up.

    Args:
        model: The target.
        settings: What the recipe says of training; reaches the engine as written.
        num_steps: Optimiser steps of the whole run, for the schedule.
        num_workers: Size of the process group.
        device: `cpu` or `cuda`.
    """
    import deepspeed

    if device == "cpu":
        # Without it the first engine compiles a shared-memory all-reduce: a minute, and a failure
        # where there is no compiler. Gloo alone serves (DeepSpeed 0.19.8).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pyright: ignore
    if settings.gradient_checkpointing:
        model.lm[0].model.gradient_checkpointing_enable()  # pyright: ignore
    optimizer = torch.optim.AdamW(
        _group_parameters(model, settings.weight_decay),
        lr=settings.learning_rate,
        betas=settings.betas,
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=_schedule(settings, num_steps),
        config=deepspeed_config(settings, num_workers, model.head_loss.weight.dtype),
    )
    return engine


def deepspeed_config(
    settings: TrainSettings, num_workers: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Return DeepSpeed's configuration for the recipe's training settings."""
    return {
        "train_batch_size": settings.rows_per_step,
        "train_micro_batch_size_per_gpu": settings.micro_batch_rows,
        "gradient_accumulation_steps": settings.rows_per_step
        // (num_workers * settings.micro_batch_rows),
        "gradient_clipping": settings.gradient_clipping,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": settings.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def learning_rate_share(step: int, settings: TrainSettings, num_steps: int) -> float:
    """Return the learning rate of a step as a share of the peak: linear warm-up, then cosine."""
    warmup_steps = math.ceil(settings.warmup_share * num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    low = settings.final_learning_rate_share
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _schedule(settings: TrainSettings, num_steps: int) -> Callable[[Any], Any]:
    share = partial(learning_rate_share, settings=settings, num_steps=num_steps)
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def _group_parameters(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups: vectors (norms, biases) are not decayed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def save_model(engine: Any, folder: str, *, rank: int) -> None:
    """Write the target as a Hugging Face folder of safetensors, on rank 0; all ranks must call."""
    import deepspeed

    model = engine.module.lm[0].model
    parameters = list(model.parameters()) if engine.zero_optimization_stage() == 3 else []
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None):
        if rank == 0:
            os.makedirs(folder, exist_ok=True)
            model.save_pretrained(folder, safe_serialization=True)
