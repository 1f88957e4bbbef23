"""A training engine of PyTorch alone, for a node without DeepSpeed: one worker, no sharding."""

from functools import partial

import torch

from rayfuse.config.train import TrainSettings
from rayfuse.train.batches import MicroBatch
from rayfuse.train.deepspeed_engine import group_parameters, learning_rate_share
from rayfuse.train.loss import LossWeights
from rayfuse.train.model import FusionModel


class TorchEngine:
    """What `train_steps` calls of DeepSpeed's engine, around PyTorch's AdamW.

    Weights and both moments have the dtype of the model: DeepSpeed keeps float32 copies.
    """

    global_rank = 0

    def __init__(self, model: FusionModel, settings: TrainSettings, num_steps: int) -> None:
        self.module = model
        self.device = model.head_loss.weight.device
        self.clipping = settings.gradient_clipping
        self.optimizer = torch.optim.AdamW(
            group_parameters(model, settings.weight_decay),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
            fused=self.device.type == "cuda",
        )
        share = partial(learning_rate_share, settings=settings, num_steps=num_steps)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share)
        self.is_boundary = True
        self.gradient_norm = 0.0

    def __call__(
        self, batch: MicroBatch, weights: LossWeights
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the loss and the sums of a micro-batch."""
        return self.module(batch, weights)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Mark the last micro-batch of a step."""
        self.is_boundary = is_boundary

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a micro-batch."""
        loss.backward()

    def step(self) -> None:
        """Update the weights after the last micro-batch; do nothing after the others."""
        if not self.is_boundary:
            return
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clipping)
        self.gradient_norm = float(norm)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad()

    def get_global_grad_norm(self) -> float:
        """Return the norm of the last step's gradient, before it was clipped."""
        return self.gradient_norm
