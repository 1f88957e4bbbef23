"""One worker's training loop, without Ray: steps, metrics, what happens at each."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rayfuse.train.feed import MicroBatch
from rayfuse.train.loss import LossScales


@dataclass(frozen=True)
class StepMetrics:
    """What one optimiser step was like, over all workers."""

    step: int
    """Steps done, this one included."""
    loss: float
    clm_loss: float
    """Nats per target token."""
    fusion_loss: float | None
    """Nats per position with a signal; nothing where no position has one."""
    tokens: int
    """Next tokens learned in this step."""
    learning_rate: float
    gradient_norm: float
    seconds: float

    def to_record(self) -> dict[str, Any]:
        """Return a line of metrics.jsonl."""
        return asdict(self)


def train_steps(
    engine: Any,
    steps: Iterator[list[MicroBatch]],
    *,
    clm_weight: float,
    first_step: int,
    num_workers: int,
    after_step: Callable[[StepMetrics], None],
) -> None:
    """Train on every step's micro-batches.

    The loss of a step is a sum over its positions divided by their count over all micro-batches and
    workers, so that how rows are dealt does not change it.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    for step, batches in enumerate(steps, first_step + 1):
        began = time.monotonic()
        positions = sum(len(batch.next_ids) for batch in batches)
        signals = sum(int(batch.has_signal.sum()) for batch in batches)
        positions, signals = _sum_over_workers([positions, signals], engine.device)
        # DeepSpeed divides by the workers and the micro-batches; the counts have done that already.
        undo = num_workers * len(batches)
        scales = LossScales(
            clm=clm_weight / max(positions, 1) * undo,
            fusion=(1 - clm_weight) / max(signals, 1) * undo,
        )
        sums = torch.zeros(2, dtype=torch.float64)
        learning_rate = engine.optimizer.param_groups[0]["lr"]
        for batch in batches:
            loss, batch_sums = engine(batch, scales)
            engine.backward(loss)
            engine.step()
            sums += batch_sums.double().cpu()
        clm, fusion = _sum_over_workers(sums.tolist(), engine.device)
        metrics = _describe_step(clm, fusion, positions, signals, clm_weight)
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(f"the loss of step {step} is {metrics['loss']}")
        after_step(
            StepMetrics(
                step=step,
                tokens=int(positions),
                learning_rate=learning_rate,
                gradient_norm=float(engine.get_global_grad_norm() or 0.0),
                seconds=time.monotonic() - began,
                **metrics,
            )
        )


def _describe_step(
    clm: float, fusion: float, positions: float, signals: float, clm_weight: float
) -> dict[str, Any]:
    clm_loss = clm / max(positions, 1)
    fusion_loss = fusion / signals if signals else None
    loss = clm_weight * clm_loss + (1 - clm_weight) * (fusion_loss or 0.0)
    return {"loss": loss, "clm_loss": clm_loss, "fusion_loss": fusion_loss}


def _sum_over_workers(values: list[float], device: Any) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total.tolist()
