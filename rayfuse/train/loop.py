"""One worker's training loop, without Ray: steps, metrics, validation, what happens at each."""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from rayfuse.config.train import Curve, value_at
from rayfuse.train.batches import MicroBatch, Step, empty_micro_batch
from rayfuse.train.loss import LossWeights
from rayfuse.train.throughput import ThroughputMeter

MAX_SKIPPED_STEPS = 3
"""Steps in a row whose loss or gradient is not finite before a training ends."""


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
    is_skipped: bool
    """The loss or a gradient was not finite, so the weights are those of the step before."""
    loss: float | None
    """Here and below: nothing where it is not finite."""
    clm_loss: float | None
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
    gradient_norm: float | None
    batch_id: str
    """Of the rows of the step: equal in runs that train on the same rows."""
    seconds: float
    wait_seconds: float
    """Of them, waiting for data."""
    tokens_per_second: float
    flops_per_second: float
    """Of each worker, as 6 a token and weight, attention besides."""
    mfu: float | None
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
    skipped_before: int = 0,
    seed: int = 0,
) -> None:
    """Train on every step's micro-batches.

    The loss of a step is a sum over its positions divided by their count over all micro-batches and
    workers, so that how rows are dealt does not change it. A step whose loss or gradient is not
    finite leaves the weights as they are; several such steps in a row end the training.

    Args:
        engine: The engine; all workers must call.
        steps: This worker's share of each.
        objective: What the losses weigh.
        first_step: Steps done before.
        num_workers: Size of the process group.
        after_step: Called with each step's metrics.
        skipped_before: Steps skipped in a row up to the first.
        seed: Of what is drawn by chance in a step, such as dropout.

    Raises:
        FloatingPointError: `MAX_SKIPPED_STEPS` in a row were not finite.
    """
    meter = ThroughputMeter(engine)
    num_sources = len(objective.source_names)
    step, skipped = first_step, skipped_before
    while True:
        began = time.monotonic()
        part = next(steps, None)
        if part is None:
            return
        waited = time.monotonic() - began
        step += 1
        seed_dropout(seed, step, engine.global_rank)
        positions, signals, batches = share_out(part.batches, num_sources, engine.device)
        weights = objective.weights_at(step, positions, num_workers)
        sums = torch.zeros(2 + num_sources, dtype=torch.float64, device=engine.device)
        learning_rate = engine.optimizer.param_groups[0]["lr"]
        for number, batch in enumerate(batches, 1):
            is_last = number == len(batches)
            engine.set_gradient_accumulation_boundary(is_last)
            loss, batch_sums = engine(batch, weights)
            # Times 1, or times NaN where it is not finite: no worker then has a gradient to use.
            engine.backward(loss * (1 + 0 * loss.detach()))
            sums[0] += loss.detach()
            sums[1:] += batch_sums
            if not is_last:
                engine.step()
        scaled_loss, clm, *by_source = sum_over_workers(sums, engine.device)
        is_taken = take_step(engine)
        skipped = 0 if is_taken else skipped + 1
        seconds = time.monotonic() - began
        after_step(
            StepMetrics(
                step=step,
                is_skipped=not is_taken,
                loss=_if_finite(scaled_loss / num_workers),
                clm_loss=_if_finite(clm / max(positions, 1)),
                fusion_loss=_if_finite(sum(by_source) / sum(signals)) if sum(signals) else None,
                source_losses={
                    name: nats / count
                    for name, nats, count in zip(
                        objective.source_names, by_source, signals, strict=True
                    )
                    if count and math.isfinite(nats)
                },
                tokens=int(positions),
                clm_weight=weights.clm,
                temperature=weights.temperature,
                learning_rate=learning_rate,
                gradient_norm=float(engine.get_global_grad_norm() or 0.0) if is_taken else None,
                batch_id=part.batch_id,
                seconds=seconds,
                wait_seconds=waited,
                num_workers=num_workers,
                **meter.measure(part.batches, positions, seconds),
            )
        )
        if skipped == MAX_SKIPPED_STEPS:
            raise FloatingPointError(
                f"the losses or gradients of steps {step - skipped + 1} to {step} are not finite; "
                "the last checkpoint is kept. Lower train.learning_rate, or train.gradient_clipping"
            )


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make chance in a step a function of these alone: a run that goes on repeats no other's."""
    torch.manual_seed(int(np.random.default_rng([seed, step, rank]).integers(2**63)))


def take_step(engine: Any) -> bool:
    """Take the optimiser's step unless a gradient is not finite; return whether it was taken.

    DeepSpeed looks at the norm of the gradients itself, but for plain AdamW (ZeRO-0 in float32).
    """
    if hasattr(engine.optimizer, "overflow"):
        engine.step()
        is_taken = engine.was_step_applied()
    else:
        grads = [each.grad for each in engine.module.parameters() if each.grad is not None]
        is_taken = bool(torch.nn.utils.get_total_norm(grads).isfinite())
        engine.step() if is_taken else engine.zero_grad()
    if not is_taken:  # the schedule goes by the step's number all the same
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            engine.lr_scheduler.step()
    return is_taken


def _if_finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


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
