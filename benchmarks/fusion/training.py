"""Training in one process, without a cluster, with rayfuse's own batches, objective and loss."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int

from benchmarks.fusion.rivals import RivalModel
from rayfuse.config.train import TrainSettings
from rayfuse.fuse.reader import FusedRows
from rayfuse.fuse.rules import make_empty
from rayfuse.models.causal_lm import CausalLM
from rayfuse.train.batches import MicroBatch, Packing, build_micro_batches
from rayfuse.train.deepspeed_engine import group_parameters, learning_rate_share
from rayfuse.train.loop import Objective
from rayfuse.train.model import FusionModel

PACKING = Packing(sequence_tokens=1, sequences=64, is_packed=False)
"""Every row is a sequence of its own: MPT's attention does not separate packed rows."""


@dataclass(frozen=True)
class WrittenBatch(MicroBatch):
    """Rows that a source wrote: their next tokens are samples, and labels only where no source has
    a signal."""


def train_lm(
    lm: CausalLM,
    steps: Iterable[list[MicroBatch]],
    settings: TrainSettings,
    *,
    num_steps: int,
    source_names: tuple[str, ...] = (),
    rival: RivalModel | None = None,
    after_step: Callable[[], None] | None = None,
) -> list[float]:
    """Train a model in place, and return the language-modeling loss of every step.

    Args:
        lm: The model.
        steps: The micro-batches of each step.
        settings: The loss and the optimizer.
        num_steps: Number of steps, for the learning-rate schedule.
        source_names: The sources, for the fusion loss by source.
        rival: The model with another library's loss, in place of rayfuse's.
        after_step: Called after each step.

    Raises:
        FloatingPointError: A loss is not finite.
    """
    model = rival or FusionModel(lm, settings, num_sources=len(source_names))
    optimizer = torch.optim.AdamW(
        group_parameters(model, settings.weight_decay),
        lr=settings.learning_rate,
        betas=settings.betas,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_share(step, settings, num_steps)
    )
    objective = Objective(settings.clm_weight, settings.temperature, num_steps, source_names)
    losses: list[float] = []
    model.train()
    for step, batches in enumerate(steps, 1):
        positions = float(sum(len(batch.positions) for batch in batches))
        weights = objective.weights_at(step, positions, 1)
        total = 0.0
        for batch in batches:
            is_written = isinstance(batch, WrittenBatch)
            loss, sums = model(batch, replace(weights, clm=0.0) if is_written else weights)
            loss.backward()
            total += float(sums[0])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clipping)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"step {step}: the gradient is not finite")
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(total / positions)
        if after_step is not None:
            after_step()
    model.eval()
    return losses


def lay_out_text(
    rows: Int[torch.Tensor, "rows seq_len"], rows_per_step: int
) -> Iterator[list[MicroBatch]]:
    """Yield the micro-batches of plain text, step by step."""
    for part in rows.split(rows_per_step):
        ids = part.numpy().astype(np.int32)
        lengths = np.full(len(ids), ids.shape[1])
        selected = np.full(ids.size, -1, dtype=np.int16)
        text = FusedRows(ids.reshape(-1), lengths, make_empty(ids.size), selected)
        yield build_micro_batches(text, PACKING)
