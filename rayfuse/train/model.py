"""The target as a DeepSpeed engine: one module from token ids to the fused loss."""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from rayfuse.config.train import LoraSettings, TrainSettings
from rayfuse.models.causal_lm import CausalLM
from rayfuse.train.batches import MicroBatch
from rayfuse.train.loss import HeadLoss, LossTargets, LossWeights


class FusionModel(nn.Module):
    """A target LLM whose forward pass is the loss."""

    def __init__(self, lm: CausalLM, settings: TrainSettings, *, num_sources: int) -> None:
        """Take a target, and put adapters into it if the settings say so.

        Args:
            lm: The target; its weights are those that are trained.
            settings: The divergence, and adapters.
            num_sources: How many sources the loss is booked under.
        """
        super().__init__()
        if settings.lora is not None:
            lm = replace(lm, model=add_adapters(lm.model, settings.lora))
        self.model = lm.model
        self.lm = [lm]  # in a list: its body and head are modules of `model` already
        self.head_loss = HeadLoss(
            lm, settings, num_sources=num_sources, chunk_positions=settings.chunk_positions
        )

    def forward(self, batch: MicroBatch, weights: LossWeights) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scaled loss, and the plain sums in nats: CLM, then D by source."""
        lm = self.lm[0]
        device = self.head_loss.weight.device

        def move(array: Any) -> torch.Tensor:
            tensor = torch.from_numpy(array)
            tensor = tensor.pin_memory() if device.type == "cuda" else tensor
            tensor = tensor.to(device, non_blocking=True)
            return tensor.long() if tensor.dtype in (torch.int32, torch.int16) else tensor

        places = None if batch.position_ids is None else move(batch.position_ids)
        hidden = lm.hidden_states(move(batch.token_ids), places)
        is_fused = weights.clm < 1
        targets = LossTargets(
            next_ids=move(batch.next_ids),
            has_signal=move(batch.has_signal),
            sources=move(batch.sources),
            top_ids=move(batch.top_ids if is_fused else batch.top_ids[:, :0]),
            top_probs=move(batch.top_probs if is_fused else batch.top_probs[:, :0]),
            tail_probs=move(batch.tail_probs),
        )
        return self.head_loss(hidden.flatten(0, 1)[move(batch.positions)], targets, weights)


def add_adapters(model: nn.Module, settings: LoraSettings) -> nn.Module:
    """Return a model with low-rank adapters, which alone are trained.

    Raises:
        ValueError: peft is not installed, or the model has no such layers.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("train.lora needs peft; pip install 'rayfuse[lora]'") from error
    modules = settings.modules
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=settings.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)  # pyright: ignore[reportArgumentType]


def build_engine(
    model: FusionModel,
    settings: TrainSettings,
    *,
    num_steps: int,
    num_workers: int,
    device: str,
    load_universal: bool = False,
) -> Any:
    """Return the DeepSpeed engine that trains a model; the process group must be up.

    Args:
        model: The target.
        settings: What the recipe says of training; reaches the engine as written.
        num_steps: Optimiser steps of the whole run, for the schedule.
        num_workers: Size of the process group.
        device: `cpu` or `cuda`.
        load_universal: A checkpoint in DeepSpeed's universal format will be loaded.
    """
    import deepspeed

    if device == "cpu":
        # Without it the first engine compiles a shared-memory all-reduce: a minute, and a failure
        # where there is no compiler. Gloo alone serves (DeepSpeed 0.19.8).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pyright: ignore
    if settings.gradient_checkpointing:
        lm: Any = model.lm[0].model
        # The newer name first: the older one is going away.
        getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)()
        if settings.lora is not None:
            lm.enable_input_require_grads()  # else nothing before the first adapter has gradients
    optimizer = torch.optim.AdamW(
        group_parameters(model, settings.weight_decay),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=_schedule(settings, num_steps),
        config=deepspeed_config(settings, num_workers, model.head_loss.weight.dtype)
        | {"checkpoint": {"load_universal": load_universal}},
    )
    return engine


def deepspeed_config(
    settings: TrainSettings, num_workers: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Return DeepSpeed's configuration for the recipe's training settings."""
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if settings.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        # The loop says which micro-batch is the last of a step: their number varies.
        "train_batch_size": num_workers,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.gradient_clipping,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": False},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # it would be compiled
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def learning_rate_share(step: int, settings: TrainSettings, num_steps: int) -> float:
    """Return the learning rate of a step as a share of the peak: a linear rise, then its schedule.

    Args:
        step: Steps done before it.
        settings: The warm-up, the schedule and where it ends.
        num_steps: Of the whole run.
    """
    warmup_steps = math.ceil(settings.warmup_share * num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min((step - warmup_steps) / max(num_steps - warmup_steps, 1), 1.0)
    low = settings.final_learning_rate_share
    match settings.schedule:
        case "cosine":
            return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))
        case "linear":
            return 1 - (1 - low) * done
        case "constant":
            return 1.0


def _schedule(settings: TrainSettings, num_steps: int) -> Callable[[Any], Any]:
    share = partial(learning_rate_share, settings=settings, num_steps=num_steps)
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def group_parameters(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
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
            if hasattr(model, "merge_and_unload"):  # adapters go into the weights
                model = model.merge_and_unload()
            model.save_pretrained(folder, safe_serialization=True)
