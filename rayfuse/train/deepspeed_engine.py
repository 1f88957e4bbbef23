"""The DeepSpeed engine around the target: its configuration, optimizer, schedule, and export.

deepspeed is imported inside functions: without a GPU its import prints a warning, and the driver,
which imports this module, needs none of it.
"""

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from rayfuse.config.train import TrainSettings
from rayfuse.train.model import FusionModel


def build_engine(
    model: FusionModel,
    settings: TrainSettings,
    *,
    num_steps: int,
    num_workers: int,
    device: str,
    load_universal: bool = False,
) -> Any:
    """Build the DeepSpeed engine that trains a model; the process group must be initialised.

    Args:
        model: The target.
        settings: The training settings.
        num_steps: Optimizer steps of the entire run, for the schedule.
        num_workers: Size of the process group.
        device: `cpu` or `cuda`.
        load_universal: Whether a checkpoint in DeepSpeed's universal format will be loaded.
    """
    deepspeed = _import_deepspeed()
    if device == "cpu":
        # Otherwise DeepSpeed 0.19.8 compiles a shared-memory all-reduce for the first engine: that
        # takes a minute, and fails without a compiler. Gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pyright: ignore
    if settings.gradient_checkpointing:
        lm: Any = model.lm[0].model
        # transformers renames the method: the newer name first.
        getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)()
        if settings.lora is not None:
            lm.enable_input_require_grads()  # else autograd stops at the frozen embedding
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
    """Translate the training settings to DeepSpeed's configuration."""
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if settings.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        # The number of micro-batches varies from step to step, so DeepSpeed must not count them:
        # the loop marks the last one with set_gradient_accumulation_boundary.
        "train_batch_size": num_workers,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.gradient_clipping,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": False},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # it would need a compiler
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def learning_rate_share(step: int, settings: TrainSettings, num_steps: int) -> float:
    """Compute the learning rate of a step as a share of the peak: linear warm-up, then decay.

    Args:
        step: Steps before it.
        settings: The warm-up, the schedule and its final share.
        num_steps: Steps of the entire run.
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
    """Group the trained parameters: weight decay for matrices, none for norms and biases."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def save_model(engine: Any, folder: str, *, rank: int) -> None:
    """Write the target as a Hugging Face folder of safetensors on rank 0; all ranks must call."""
    model = engine.module.lm[0].model
    # ZeRO-3 has partitioned the weights over the ranks; they are gathered while they are written.
    parameters = list(model.parameters()) if engine.zero_optimization_stage() == 3 else []
    with _import_deepspeed().zero.GatheredParameters(parameters, modifier_rank=None):
        if rank == 0:
            os.makedirs(folder, exist_ok=True)
            if hasattr(model, "merge_and_unload"):  # LoRA: add the adapters to the weights
                model = model.merge_and_unload()
            model.save_pretrained(folder, safe_serialization=True)


def _import_deepspeed() -> Any:
    """Import DeepSpeed, which takes seconds and starts processes, in training alone."""
    import deepspeed

    return deepspeed
