"""The settings of training."""

import math
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from rayfuse.config.base import (
    BASELINE_ONLY,
    FUSION_ONLY,
    Settings,
    Share,
    later_setting,
    result_neutral,
)


class Ramp(Settings):
    """A setting that changes from one value to another in the course of training."""

    start: NonNegativeFloat
    """At the first step."""
    end: NonNegativeFloat
    """At the last step."""
    shape: Literal["linear", "cosine"] = "linear"
    """`linear`: at a constant rate; `cosine`: slower at both ends."""


Curve = float | Ramp
"""A constant setting, or one that changes during training."""


def value_at(curve: Curve, done: float) -> float:
    """Compute the value of a setting at a point of training.

    Args:
        curve: The setting.
        done: Completed share of the training: 0 at the first step, 1 at the last.
    """
    if not isinstance(curve, Ramp):
        return curve
    progress = done if curve.shape == "linear" else (1 - math.cos(math.pi * done)) / 2
    return curve.start + (curve.end - curve.start) * progress


def describe_curve(curve: Curve) -> str:
    """Format a setting for logs and tables."""
    if isinstance(curve, Ramp):
        return f"{curve.start:g} to {curve.end:g} ({curve.shape})"
    return f"{curve:g}"


class LoraSettings(Settings):
    """Low-rank adapters that are trained instead of the target's weights, and merged at the end."""

    rank: PositiveInt = 16
    """Rank of the two matrices of an adapter."""
    alpha: PositiveFloat = 32.0
    """The adapters' output is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that are dropped in training."""
    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """The layers that get adapters, by peft's names."""


class TrainSettings(Settings):
    """How the target is trained on the fused rows."""

    clm_weight: Curve = Field(
        default=Ramp(start=0.5, end=0.9), alias="lambda", json_schema_extra=FUSION_ONLY
    )
    """lambda of L = lambda * CLM + (1 - lambda) * D(fused || target); the paper has 0.9. A number,
    or `{start: 0.5, end: 0.9, shape: linear | cosine}`, as by default: the sources weigh most while
    the target knows least of the text (`benchmarks/fusion`)."""
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl"] = Field(
        default="forward_kl", json_schema_extra=FUSION_ONLY
    )
    """D: how far the target is from the fused distribution."""
    skew: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.1, json_schema_extra=FUSION_ONLY)
    """Share of the fused distribution in the mixture that skewed KL compares it with."""
    temperature: Curve = Field(default=1.0, json_schema_extra=FUSION_ONLY)
    """Temperature of D, above 0; a number or a ramp, as for lambda."""
    baseline: bool = result_neutral(True)
    """Also train the target on the same rows, in the same order, without fusion (CLM)."""
    baseline_learning_rate: PositiveFloat | None = Field(
        default=None, json_schema_extra=BASELINE_ONLY
    )
    """The peak of CLM; by default that of fusion. Labels that are read again need a lower rate than
    distributions do, so a comparison at one rate flatters fusion."""
    learning_rate: PositiveFloat = 1e-5
    """The peak, reached after the warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from its peak."""
    final_learning_rate_share: Share = 0.0
    """Final learning rate of `cosine` and `linear`, as a share of the peak."""
    warmup_share: Share = 0.008
    """Share of all steps in which the learning rate rises."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    epsilon: PositiveFloat = 1e-8
    """AdamW's epsilon, added to the denominator."""
    weight_decay: NonNegativeFloat = 0.1
    """AdamW's weight decay; not applied to vectors (norms and biases)."""
    gradient_clipping: PositiveFloat = 1.0
    """Maximum norm of the gradient."""
    epochs: PositiveInt = 1
    """Number of passes over all rows."""
    rows_per_step: PositiveInt = 128
    """Rows per optimiser step, over all workers."""
    pack: bool = result_neutral(True)
    """Pack several rows into one sequence, without attention between them, if the target supports
    it; else rows are padded to the longest. On a GPU where `flash-attn` is installed it computes
    the attention of packed rows, which then needs no mask."""
    sequence_tokens: PositiveInt | None = result_neutral(None)
    """Maximum tokens of a sequence; by default corpus.max_tokens."""
    micro_batch_sequences: PositiveInt = result_neutral(1)
    """Sequences per forward pass of one worker."""
    chunk_positions: PositiveInt | None = result_neutral(None)
    """Positions whose logits are in memory at a time; by default 64 MiB of logits, on a GPU 256
    positions."""
    num_workers: PositiveInt = result_neutral(1)
    """Ray Train workers."""
    min_workers: PositiveInt | None = result_neutral(None)
    """Fewest workers with which training continues when nodes are lost, until others come; by
    default it waits for all. Steps have the same rows with any number."""
    gpus_per_worker: NonNegativeFloat | None = result_neutral(None)
    """GPUs of one worker; by default 1 if accelerator_type is set or the cluster has or may add
    GPUs, else 0 (training on CPUs with gloo)."""
    cpus_per_worker: PositiveFloat = result_neutral(1.0)
    """CPUs of one worker."""
    accelerator_type: str | None = result_neutral(None)
    """The workers' GPU type by Ray's name; the trained models are evaluated on it, too."""
    placement: Literal["pack", "strict_pack", "spread", "strict_spread"] = result_neutral("pack")
    """How Ray places the workers. `pack`: on as few nodes as possible; `strict_pack`: all on one
    node; `spread`: on many nodes; `strict_spread`: each on its own node."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed's ZeRO: 1 shards optimiser states, 2 gradients as well, 3 weights as well."""
    offload: bool = False
    """Keep optimiser states in host memory (and with ZeRO 3, weights)."""
    gradient_checkpointing: bool = result_neutral(False)
    """Recompute activations in the backward pass instead of storing them."""
    lora: LoraSettings | None = None
    """Train adapters instead of all weights; needs `pip install 'rayfuse[lora]'`."""
    loss_on: Literal["answers", "all"] = later_setting("answers")
    """The tokens of conversations that are learned: those of answers and of the ends of their
    turns, or all, also of the template and of the user. Only answers have signals."""
    publish: Literal["last", "best"] = later_setting("last")
    """The weights that become the model. `last`: those after the last step. `best`: those with the
    lowest bits per byte in a validation, whose rows are drawn from half of the held-out documents;
    a checkpoint is saved whenever they fall, and the report compares models on the other half."""
    patience: PositiveInt | None = later_setting(None)
    """Validations in a row without a new best after which training ends, with `publish: best`; by
    default it takes all steps."""
    checkpoint_every_steps: PositiveInt = result_neutral(500)
    """Steps between checkpoints."""
    keep_checkpoints: PositiveInt = result_neutral(2)
    """Number of newest checkpoints to keep, besides the one with the best validation."""
    validate_every_steps: PositiveInt = result_neutral(500)
    """Steps between validations: bits per byte on held-out rows."""
    validation_rows: NonNegativeInt = result_neutral(64)
    """Held-out rows per validation; 0 for no validation."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = result_neutral(())
    """Experiment trackers for the metrics, besides metrics.jsonl; each must be installed."""
    max_failures: NonNegativeInt = result_neutral(3)
    """Failures of workers after which training resumes from the last checkpoint; nodes lost with
    notice do not count. Raise it on a spot market that gives no notice."""

    @field_validator("clm_weight")
    @classmethod
    def _check_clm_weight(cls, value: Curve) -> Curve:
        for point in (value.start, value.end) if isinstance(value, Ramp) else (value,):
            if not 0 <= point <= 1:
                raise ValueError(f"lambda is a share, but {point:g} is not between 0 and 1")
        return value

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, value: Curve) -> Curve:
        for point in (value.start, value.end) if isinstance(value, Ramp) else (value,):
            if point <= 0:
                raise ValueError(f"temperature {point:g} is not above 0; 1 changes nothing")
        return value

    @model_validator(mode="after")
    def _check_workers(self) -> "TrainSettings":
        if self.rows_per_step < self.num_workers:
            raise ValueError(
                f"rows_per_step {self.rows_per_step} is below num_workers {self.num_workers}, so "
                "that some workers would have no rows; raise it"
            )
        if (self.min_workers or 1) > self.num_workers:
            raise ValueError(
                f"min_workers {self.min_workers} is above num_workers {self.num_workers}; lower it"
            )
        return self

    @model_validator(mode="after")
    def _check_publish(self) -> "TrainSettings":
        if self.publish == "best" and not self.validation_rows:
            raise ValueError("publish is best, but validation_rows is 0; raise it")
        if self.patience is not None and self.publish != "best":
            raise ValueError(f"patience {self.patience} needs publish: best; set it, or remove one")
        return self

    def for_run(self, *, is_fused: bool) -> "TrainSettings":
        """Return the settings of one of the two trainings: CLM may have a learning rate of its own.

        Args:
            is_fused: Of the training with fusion.
        """
        if is_fused or self.baseline_learning_rate is None:
            return self
        return self.model_copy(update={"learning_rate": self.baseline_learning_rate})

    def dump_result_settings(self, *, with_fusion: bool = True) -> dict[str, Any]:
        """Dump the settings that affect the result; with `publish: best` validation does, too."""
        own = self.for_run(is_fused=with_fusion)
        dumped = super(TrainSettings, own).dump_result_settings(with_fusion=with_fusion)
        if self.publish == "best":
            dumped["validate_every_steps"] = self.validate_every_steps
            dumped["validation_rows"] = self.validation_rows
        return dumped

    @property
    def is_fused(self) -> bool:
        """Whether the sources have any weight in the loss."""
        return self.clm_weight != 1
