"""One worker's training loop, without Ray: steps, metrics, validation, what happens at each."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from rayfuse.recipe import Curve, value_at
from rayfuse.train.feed import MicroBatch, Step, empty_micro_batch
from rayfuse.train.loss import LossWeights
from rayfuse.train.measures import Meter


@dataclass(frozen=True)
class Objective:
    """What the loss of each step weighs."""

    clm_weight: Curve
    """lambda; 1 for a run without fusion."""
    temperature: Curve
    num_steps: int
    """Of the whole run."""
    source_names: tuple[str, ...]

    def weights_at(self, step: int, positions: float, num_workers: int) -> LossWeights:
        """Return the weights of a step.

        Args:
            step: Its number, from 1.
            positions: Next tokens learned in it, over all workers.
            num_workers: DeepSpeed divides by them what the count has divided already.
        """
        done = (step - 1) / max(self.num_steps - 1, 1)
        return LossWeights(
            scale=num_workers / max(positions, 1),
            clm=value_at(self.clm_weight, done),
            temperature=value_at(self.temperature, done),
        )


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
    source_losses: dict[str, float]
    """The same over the positions of each source that was the likeliest there."""
    tokens: int
    """Next tokens learned in this step."""
    clm_weight: float
    temperature: float
    learning_rate: float
    gradient_norm: float
    batch_id: str
    """Of the rows of the step: equal in runs that train on the same rows."""
    seconds: float
    wait_seconds: float
    """Of them, waiting for data."""
    tokens_per_second: float
    flops_per_second: float
    """Of each worker, as 6 a token and weight, attention besides."""
    utilisation: float | None
    """Share of what the GPU can do in this type; nothing where that is not known."""
    memory_gib: float
    """The most that this process, or its GPU, has held."""
    num_workers: int

    def to_record(self) -> dict[str, Any]:
        """Return a line of metrics.jsonl."""
        return asdict(self)


def train_steps(
    engine: Any,
    steps: Iterator[Step],
    objective: Objective,
    *,
    first_step: int,
    num_workers: int,
    after_step: Callable[[StepMetrics], None],
) -> None:
    """Train on every step's micro-batches.

    The loss of a step is a sum over its positions divided by their count over all micro-batches and
    workers, so that how rows are dealt does not change it.

    Raises:
        FloatingPointError: The loss is not finite; the weights are those of the step before.
    """
    meter = Meter(engine)
    num_sources = len(objective.source_names)
    step = first_step
    while True:
        began = time.monotonic()
        part = next(steps, None)
        if part is None:
            return
        waited = time.monotonic() - began
        step += 1
        positions, signals, batches = share_out(part.batches, num_sources, engine.device)
        weights = objective.weights_at(step, positions, num_workers)
        sums = torch.zeros(2 + num_sources, dtype=torch.float64, device=engine.device)
        learning_rate = engine.optimizer.param_groups[0]["lr"]
        for number, batch in enumerate(batches, 1):
            is_last = number == len(batches)
            engine.set_gradient_accumulation_boundary(is_last)
            loss, batch_sums = engine(batch, weights)
            engine.backward(loss)
            sums[0] += loss.detach()
            sums[1:] += batch_sums
            if not is_last:
                engine.step()
        scaled_loss, clm, *by_source = sum_over_workers(sums, engine.device)
        if not math.isfinite(scaled_loss):
            raise FloatingPointError(
                f"the loss of step {step} is {scaled_loss}; the last checkpoint is from before. "
                "Lower train.learning_rate, or train.gradient_clipping"
            )
        engine.step()
        seconds = time.monotonic() - began
        after_step(
            StepMetrics(
                step=step,
                loss=scaled_loss / num_workers,
                clm_loss=clm / max(positions, 1),
                fusion_loss=sum(by_source) / sum(signals) if sum(signals) else None,
                source_losses={
                    name: nats / count
                    for name, nats, count in zip(
                        objective.source_names, by_source, signals, strict=True
                    )
                    if count
                },
                tokens=int(positions),
                clm_weight=weights.clm,
                temperature=weights.temperature,
                learning_rate=learning_rate,
                gradient_norm=float(engine.get_global_grad_norm() or 0.0),
                batch_id=part.batch_id,
                seconds=seconds,
                wait_seconds=waited,
                num_workers=num_workers,
                **meter.measure(part.batches, positions, seconds),
            )
        )


def share_out(
    batches: list[MicroBatch], num_sources: int, device: Any
) -> tuple[float, list[float], list[MicroBatch]]:
    """Return what all workers have in a step, and this one's micro-batches, as many as any has.

    Args:
        batches: This worker's own.
        num_sources: Sources that a position may be booked under.
        device: Where the process group adds up.

    Returns:
        Next tokens of all workers; how many of them each source speaks of; the micro-batches.
    """
    speakers = np.concatenate([np.zeros(0, np.int64), *(batch.sources for batch in batches)])
    by_source = np.bincount(speakers[speakers >= 0], minlength=num_sources)
    positions = sum(len(batch.positions) for batch in batches)
    total, *signals = sum_over_workers(
        torch.tensor([positions, *by_source.tolist()], dtype=torch.float64), device
    )
    most = torch.tensor(len(batches), device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    padded = [*batches]
    while len(padded) < int(most):
        padded.append(empty_micro_batch(batches[0] if batches else None))
    return total, signals, padded


def sum_over_workers(values: Float[torch.Tensor, " values"], device: Any) -> list[float]:
    """Return the sums of some numbers over all workers."""
    total = values.to(device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total.tolist()


@torch.no_grad()
def measure_bits_per_byte(
    engine: Any, batches: list[MicroBatch], token_bytes: Int[np.ndarray, " vocab"]
) -> float:
    """Return the target's bits per byte over the rows of all workers' micro-batches.

    Args:
        engine: The engine; all workers must call.
        batches: This worker's.
        token_bytes: How many bytes each target token spells.
    """
    positions, _, batches = share_out(batches, 0, engine.device)
    weights = LossWeights(scale=1 / max(positions, 1), clm=1.0)
    engine.eval()
    nats = torch.zeros((), dtype=torch.float64, device=engine.device)
    num_bytes = 0
    for batch in batches:
        nats += engine(batch, weights)[1][0]
        num_bytes += int(token_bytes[batch.next_ids].sum())
    engine.train()
    total_nats, total_bytes = sum_over_workers(
        torch.stack([nats, torch.tensor(float(num_bytes), device=engine.device).double()]),
        engine.device,
    )
    return total_nats / math.log(2) / max(total_bytes, 1)
