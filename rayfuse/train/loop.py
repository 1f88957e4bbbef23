"""One worker's training loop, without Ray: steps, their metrics, and validation."""

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
"""Consecutive steps with a loss or gradient that is not finite, after which training ends."""


@dataclass(frozen=True)
class Objective:
    """The weights of the losses over the course of a run."""

    clm_weight: Curve
    """lambda; 1 for a run without fusion."""
    temperature: Curve
    """Of the divergence."""
    num_steps: int
    """Steps of the entire run."""
    source_names: tuple[str, ...]

    def weights_at(self, step: int, positions: float, num_workers: int) -> LossWeights:
        """Compute the weights of a step.

        Args:
            step: Its number, from 1.
            positions: Next tokens learned in it, over all workers.
            num_workers: Size of the process group.
        """
        # DeepSpeed averages gradients over the workers; `positions` counts all of theirs already,
        # so the factor num_workers turns that mean back into a sum.
        done = (step - 1) / max(self.num_steps - 1, 1)
        return LossWeights(
            scale=num_workers / max(positions, 1),
            clm=value_at(self.clm_weight, done),
            temperature=value_at(self.temperature, done),
        )


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of one optimizer step, over all workers."""

    step: int
    """Its number, from 1."""
    is_skipped: bool
    """The loss or a gradient was not finite, so the weights are unchanged."""
    loss: float | None
    """None here and below: it is not finite."""
    clm_loss: float | None
    """Nats per target token."""
    fusion_loss: float | None
    """Nats per position with a signal; None if no position has one."""
    source_losses: dict[str, float]
    """The same over the positions at which each source has the lowest cost."""
    source_shares: dict[str, float]
    """Share of the positions with a signal at which each source has the lowest cost."""
    tokens: int
    """Next tokens learned in this step."""
    clm_weight: float
    temperature: float
    learning_rate: float
    gradient_norm: float | None
    batch_id: str
    """A hash of the rows of the step: equal in runs that train on the same rows."""
    seconds: float
    wait_seconds: float
    """The part of `seconds` that went to waiting for data."""
    tokens_per_second: float
    flops_per_second: float
    """Of each worker: 6 per token and weight, 4 if the weight is frozen, plus attention."""
    mfu: float | None
    """Model FLOPs utilization, a share of the GPU's peak; None if the peak is unknown."""
    memory_gib: float
    """Peak memory of this process, or of its GPU."""
    num_workers: int

    def to_record(self) -> dict[str, Any]:
        """Return the values of a line of metrics.jsonl."""
        return asdict(self)


@dataclass(frozen=True)
class StepInputs:
    """A worker's micro-batches of a step, and how much all workers have in it."""

    batches: list[MicroBatch]
    """As many on every worker."""
    num_positions: float
    """Next tokens of all workers."""
    source_positions: list[float]
    """Of them, those of each source's distributions."""


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
    """Train on the micro-batches of every step.

    The loss of a step is a sum over its positions divided by their count over all micro-batches and
    workers, so it does not depend on how the rows are divided among them. A step with a loss or
    gradient that is not finite leaves the weights unchanged; several consecutive ones end the
    training.

    Args:
        engine: The DeepSpeed engine; all workers must call.
        steps: This worker's share of each step.
        objective: The weights of the losses.
        first_step: Steps done before.
        num_workers: Size of the process group.
        after_step: Called with each step's metrics.
        skipped_before: Consecutive steps that were skipped just before `first_step`.
        seed: Seed of the randomness within steps, such as dropout.

    Raises:
        FloatingPointError: `MAX_SKIPPED_STEPS` consecutive steps were not finite.
    """
    meter = ThroughputMeter(engine)
    num_sources = len(objective.source_names)
    step, skipped = first_step, skipped_before
    while True:
        started = time.monotonic()
        part = next(steps, None)
        if part is None:
            return
        wait_seconds = time.monotonic() - started
        step += 1
        seed_dropout(seed, step, engine.global_rank)
        inputs = equalize_batches(part.batches, num_sources, engine.device)
        weights = objective.weights_at(step, inputs.num_positions, num_workers)
        learning_rate = engine.optimizer.param_groups[0]["lr"]  # take_step moves it on
        sums = _accumulate_gradients(engine, inputs.batches, weights, num_sources)
        totals = sum_over_workers(sums, engine.device)
        is_taken = take_step(engine)
        skipped = 0 if is_taken else skipped + 1
        seconds = time.monotonic() - started
        after_step(
            StepMetrics(
                step=step,
                is_skipped=not is_taken,
                **_average_losses(totals, inputs, objective.source_names, num_workers),
                tokens=int(inputs.num_positions),
                clm_weight=weights.clm,
                temperature=weights.temperature,
                learning_rate=learning_rate,
                gradient_norm=float(engine.get_global_grad_norm() or 0.0) if is_taken else None,
                batch_id=part.batch_id,
                seconds=seconds,
                wait_seconds=wait_seconds,
                num_workers=num_workers,
                **meter.measure(part.batches, inputs.num_positions, seconds),
            )
        )
        _check_skipped(step, skipped)


def _accumulate_gradients(
    engine: Any, batches: list[MicroBatch], weights: LossWeights, num_sources: int
) -> Float[torch.Tensor, " sums"]:
    """Run forward and backward over all micro-batches of a step, without the optimizer's step.

    Returns:
        This worker's sums: the scaled loss, CLM in nats, and the divergence in nats by source.
    """
    sums = torch.zeros(2 + num_sources, dtype=torch.float64, device=engine.device)
    for number, batch in enumerate(batches, 1):
        is_last = number == len(batches)
        # DeepSpeed reduces the gradients over the workers in the backward pass of the last one.
        engine.set_gradient_accumulation_boundary(is_last)
        loss, batch_sums = engine(batch, weights)
        # A factor of 1; of NaN if the loss is not finite. An infinite loss can have finite
        # gradients, and NaN reaches every worker with the reduction: all of them skip the step.
        engine.backward(loss * (1 + 0 * loss.detach()))
        sums[0] += loss.detach()
        sums[1:] += batch_sums
        if not is_last:
            engine.step()  # counts the micro-batch; the weights stay
    return sums


def _average_losses(
    totals: list[float], inputs: StepInputs, source_names: tuple[str, ...], num_workers: int
) -> dict[str, Any]:
    """Turn a step's sums over all workers into the losses of its metrics.

    Args:
        totals: The scaled loss, CLM in nats, and the divergence in nats by source.
        inputs: The counts to divide by.
        source_names: The names of the sources.
        num_workers: The factor in the scaled loss.
    """
    scaled_loss, clm, *by_source = totals
    counts = inputs.source_positions
    return {
        "loss": _if_finite(scaled_loss / num_workers),
        "clm_loss": _if_finite(clm / max(inputs.num_positions, 1)),
        "fusion_loss": _if_finite(sum(by_source) / sum(counts)) if sum(counts) else None,
        "source_losses": {
            name: nats / count
            for name, nats, count in zip(source_names, by_source, counts, strict=True)
            if count and math.isfinite(nats)
        },
        "source_shares": {
            name: count / sum(counts)
            for name, count in zip(source_names, counts, strict=True)
            if sum(counts)
        },
    }


def _check_skipped(step: int, skipped: int) -> None:
    if skipped == MAX_SKIPPED_STEPS:
        raise FloatingPointError(
            f"the losses or gradients of steps {step - skipped + 1} to {step} are not finite; "
            "the last checkpoint is kept. Lower train.learning_rate, or train.gradient_clipping"
        )


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seed torch by the step, so that a resumed run draws the numbers of an uninterrupted one."""
    torch.manual_seed(int(np.random.default_rng([seed, step, rank]).integers(2**63)))


def take_step(engine: Any) -> bool:
    """Take the optimizer's step unless a gradient is not finite.

    Returns:
        Whether the weights were updated.
    """
    if hasattr(engine.optimizer, "overflow"):
        engine.step()
        is_taken = engine.was_step_applied()
    else:
        # DeepSpeed's own optimizers check the gradient norm. It uses plain AdamW for ZeRO-0 in
        # float32, without that check.
        grads = [weight.grad for weight in engine.module.parameters() if weight.grad is not None]
        is_taken = bool(torch.nn.utils.get_total_norm(grads).isfinite())
        engine.step() if is_taken else engine.zero_grad()
    if not is_taken:  # the schedule is a function of the step's number: it advances here too
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            engine.lr_scheduler.step()
    return is_taken


def _if_finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def equalize_batches(batches: list[MicroBatch], num_sources: int, device: Any) -> StepInputs:
    """Count the positions of all workers, and pad each worker's micro-batches to equal numbers.

    Every forward and backward pass is collective under ZeRO: a worker with fewer micro-batches than
    another must run empty ones, or the others would wait for it forever.

    Args:
        batches: This worker's micro-batches.
        num_sources: Sources by which positions are counted.
        device: The device of the process group's collectives.
    """
    sources = np.concatenate([np.zeros(0, np.int64), *(batch.sources for batch in batches)])
    by_source = np.bincount(sources[sources >= 0], minlength=num_sources)
    positions = sum(len(batch.positions) for batch in batches)
    num_positions, *source_positions = sum_over_workers(
        torch.tensor([positions, *by_source.tolist()], dtype=torch.float64), device
    )
    num_batches = torch.tensor(len(batches), device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(num_batches, torch.distributed.ReduceOp.MAX)
    padded = [*batches]
    while len(padded) < int(num_batches):
        padded.append(empty_micro_batch(batches[0] if batches else None))
    return StepInputs(padded, num_positions, source_positions)


def sum_over_workers(values: Float[torch.Tensor, " values"], device: Any) -> list[float]:
    """Sum each of some numbers over all workers."""
    total = values.to(device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total.tolist()


@torch.no_grad()
def measure_bits_per_byte(
    engine: Any, batches: list[MicroBatch], token_bytes: Int[np.ndarray, " vocab"]
) -> float:
    """Measure the target's bits per byte over the micro-batches of all workers.

    Args:
        engine: The DeepSpeed engine; all workers must call.
        batches: This worker's micro-batches.
        token_bytes: The number of bytes of each target token.
    """
    inputs = equalize_batches(batches, 0, engine.device)
    weights = LossWeights(scale=1 / max(inputs.num_positions, 1), clm=1.0)
    engine.eval()
    nats = torch.zeros((), dtype=torch.float64, device=engine.device)
    num_bytes = 0
    for batch in inputs.batches:
        nats += engine(batch, weights)[1][0]
        num_bytes += int(token_bytes[batch.next_ids].sum())
    engine.train()
    total_nats, total_bytes = sum_over_workers(
        torch.stack([nats, torch.tensor(float(num_bytes), device=engine.device).double()]),
        engine.device,
    )
    return total_nats / math.log(2) / max(total_bytes, 1)
