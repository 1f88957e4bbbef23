"""Plan inputs -> work items: tokens, shards, bytes, requests, floating-point operations, memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rayfuse.config.align import METHODS
from rayfuse.config.models import BACKENDS, OTHER_THAN_BFLOAT16, SourceSettings
from rayfuse.config.plan import PlanSettings
from rayfuse.config.recipe import Recipe
from rayfuse.config.train import TrainSettings
from rayfuse.plan.inputs import PlanInputs, PlannedModel
from rayfuse.plan.model_size import ModelSize
from rayfuse.train.order import SHUFFLE_STREAMS

GIB = 2**30

LOGITS_BYTES, LOGITS_COPIES = 4, 3
"""Logits are in float32, and the softmax needs copies of them."""

GPU_CHUNK_POSITIONS = 256
"""Default of train.chunk_positions on a GPU."""

WEIGHT_BYTES = 2
"""bfloat16."""

PAGE_NAMES = 1000
"""Names in one page of a LIST response."""

DATA_SET_PAGES = 6
"""How often the names of a data set are listed in the course of a run, approximately."""


@dataclass(frozen=True)
class Requests:
    """Requests to object storage that grow with the run."""

    puts: float = 0.0
    gets: float = 0.0
    """HEAD included: it has the same price."""
    lists: float = 0.0

    def times(self, shards: int) -> "Requests":
        """Multiply the requests of one shard by the number of shards."""
        return Requests(self.puts * shards, self.gets * shards, self.lists * shards)


CORPUS_SHARD = Requests(puts=2.0, gets=2.0)
"""HEAD: is it committed? PUT of shard and record, and GET of the record for the manifest."""

CAPTURE_SHARD = Requests(puts=2.0, gets=4.0)
"""The same, and GET of the corpus' record and shard."""

ALIGN_SHARD = Requests(puts=2.0, gets=6.0)
"""The same, and GET of the captured record and shard."""


@dataclass(frozen=True)
class GpuWork:
    """The part of a work item that runs on GPUs."""

    flops: float
    is_training: bool
    memory_bytes: float
    """Of one actor or worker."""
    gpus: float
    """Of one actor or worker."""
    actors: int
    accelerator_type: str | None
    """The kind that the recipe names."""
    needs_bfloat16: bool = True
    takes_turns: bool = False
    """Whether its GPUs hold one model's layers and compute one after another."""


@dataclass(frozen=True)
class Work:
    """One row of the plan, the part that is already done included."""

    stage: str
    name: str
    tokens: float
    shards: int
    done: float
    """Share that is already done."""
    stored_bytes: float
    requests: Requests
    core_hours: float = 0.0
    gpu: GpuWork | None = None

    @property
    def title(self) -> str:
        """The row's name in tables, such as `capture mpt`."""
        return f"{self.stage} {self.name}".strip()


def list_work(inputs: PlanInputs) -> Iterator[Work]:
    """Yield the rows of a plan, in the order of the stages."""
    recipe, corpus = inputs.recipe, inputs.corpus
    yield _plan_corpus(inputs)
    for model, source in zip(inputs.sources, recipe.run_sources, strict=True):
        yield _plan_capture(inputs, model, source)
    for source in recipe.sources:
        yield _plan_align(inputs, source.name)
    for name in ("fused", "clm") if recipe.train.baseline else ("fused",):
        yield _plan_train(inputs, name)
    if corpus.shards:
        yield _plan_evaluate(inputs)


def _plan_corpus(inputs: PlanInputs) -> Work:
    plan, text = inputs.recipe.plan, inputs.corpus.num_bytes + inputs.held_out.num_bytes
    shards = inputs.corpus.shards + inputs.held_out.shards
    done = inputs.done.get(("corpus", ""), 0) + inputs.done.get(("corpus", "held-out"), 0)
    tokenizers = 1 + len(inputs.recipe.sources)
    return Work(
        stage="corpus",
        name="",
        tokens=text / inputs.target.bytes_per_token,
        shards=shards,
        done=_share(done, shards),
        stored_bytes=text * plan.corpus_bytes_per_byte,
        requests=_of_shards(CORPUS_SHARD, shards),
        core_hours=text * tokenizers / plan.tokenize_bytes_per_core_second / 3600,
    )


def _plan_capture(inputs: PlanInputs, model: PlannedModel, source: SourceSettings) -> Work:
    recipe, shards = inputs.recipe, inputs.corpus.shards
    plan, capture = recipe.plan, recipe.capture
    tokens = inputs.corpus.num_bytes / model.bytes_per_token
    record = plan.captured_bytes_per_token
    record += plan.captured_bytes_per_entry * capture.kept_entries
    record += plan.captured_bytes_per_draw * capture.num_draws
    batch_tokens = source.batch_tokens or capture.batch_tokens
    return Work(
        stage="capture",
        name=source.name,
        tokens=tokens,
        shards=shards,
        done=_share(inputs.done.get(("capture", source.name), 0), shards),
        stored_bytes=tokens * record,
        requests=_of_shards(CAPTURE_SHARD, shards),
        gpu=GpuWork(
            flops=tokens * model.size.forward_flops(inputs.row_tokens(model)),
            is_training=False,
            memory_bytes=forward_memory(model.size, batch_tokens, capture.chunk_positions, plan),
            gpus=1.0 if source.gpus is None else source.gpus,
            actors=source.max_actors or source.min_actors,
            accelerator_type=source.accelerator_type,
            needs_bfloat16=source.dtype not in OTHER_THAN_BFLOAT16,
            takes_turns=not BACKENDS[source.backend].computes_in_parallel,
        ),
    )


def _plan_align(inputs: PlanInputs, source: str) -> Work:
    recipe, shards = inputs.recipe, inputs.corpus.shards
    plan = recipe.plan
    tokens = inputs.corpus.num_bytes / inputs.target.bytes_per_token
    entries = recipe.capture.kept_entries + recipe.capture.num_draws
    is_mapped = METHODS[recipe.align.method].stored_map is not None
    rate = plan.mapped_tokens_per_core_second if is_mapped else plan.align_tokens_per_core_second
    return Work(
        stage="align",
        name=source,
        tokens=tokens,
        shards=shards,
        done=_share(inputs.done.get(("align", source), 0), shards),
        stored_bytes=tokens
        * (plan.aligned_bytes_per_token + plan.aligned_bytes_per_entry * entries),
        requests=_of_shards(ALIGN_SHARD, shards),
        core_hours=tokens / rate / 3600,
    )


def _plan_train(inputs: PlanInputs, name: str) -> Work:
    recipe, size = inputs.recipe, inputs.target.size
    plan, train = recipe.plan, recipe.train
    is_fused = name == "fused" and train.is_fused
    tokens = inputs.corpus.num_bytes / inputs.target.bytes_per_token * train.epochs
    flops = size.forward_flops(inputs.row_tokens(inputs.target)) * train_passes(train)
    checkpoint = size_checkpoint(size, train, plan)
    num_checkpoints = max(estimate_steps(inputs) - 1, 0) // train.checkpoint_every_steps
    parts = math.ceil(checkpoint / plan.upload_part_bytes) + 3 * train.num_workers
    sources = len(inputs.recipe.sources) if is_fused else 0
    return Work(
        stage="train",
        name=name,
        tokens=tokens,
        shards=inputs.corpus.shards,
        done=float(inputs.done.get(("train", name), 0)),
        stored_bytes=size.parameters * WEIGHT_BYTES
        + checkpoint * min(num_checkpoints, train.keep_checkpoints + 1),
        requests=Requests(
            puts=num_checkpoints * parts + size.parameters * WEIGHT_BYTES / plan.upload_part_bytes,
            gets=train.epochs
            * inputs.corpus.shards
            * (1 + sources)
            * count_readers(train.num_workers),
            lists=2 * (1 + sources) * inputs.corpus.shards / PAGE_NAMES + num_checkpoints,
        ),
        gpu=GpuWork(
            flops=tokens * flops * (plan.fused_step_ratio if is_fused else 1.0),
            is_training=True,
            memory_bytes=train_memory(size, recipe),
            gpus=1.0 if train.gpus_per_worker is None else train.gpus_per_worker,
            actors=train.num_workers,
            accelerator_type=train.accelerator_type,
        ),
    )


def _plan_evaluate(inputs: PlanInputs) -> Work:
    """Plan the evaluation of every source, the target, and the trained and merged models."""
    recipe, held_out = inputs.recipe, inputs.held_out
    names = ["fused", "clm"] if recipe.train.baseline else ["fused"]
    if inputs.layout is not None and "merged" in inputs.layout.evaluation.scores:
        names.append("merged")
    models = [*inputs.sources, *[inputs.target] * (1 + len(names))]
    tokens = [held_out.num_bytes / model.bytes_per_token for model in models]
    flops = [
        model_tokens * model.size.forward_flops(inputs.row_tokens(model))
        for model_tokens, model in zip(tokens, models, strict=True)
    ]
    batch, chunk = recipe.evaluate.batch_tokens, recipe.capture.chunk_positions
    ensemble = len(inputs.sources) if 1 < len(inputs.sources) == len(recipe.sources) else 0
    return Work(
        stage="evaluate",
        name="",
        tokens=sum(tokens),
        shards=held_out.shards,
        done=float(inputs.done.get(("evaluate", ""), 0)),
        stored_bytes=0.0,
        requests=Requests(
            puts=2.0 * ensemble * held_out.shards,
            gets=(2.0 * len(models) + 4 * ensemble + 2) * held_out.shards,
            lists=DATA_SET_PAGES * held_out.shards / PAGE_NAMES,
        ),
        gpu=GpuWork(
            flops=sum(flops),
            is_training=False,
            memory_bytes=max(
                forward_memory(model.size, batch, chunk, recipe.plan) for model in models
            ),
            gpus=1.0,
            actors=len(models),
            accelerator_type=None,
        ),
    )


def train_passes(train: TrainSettings) -> float:
    """Count the passes of a training step over the weights, in forward passes.

    A backward pass costs two forward passes, one for the gradients of activations and one for those
    of weights; recomputing checkpointed activations costs another.
    """
    backward = 1.0 if train.lora is not None else 2.0  # adapters: no gradients of the base weights
    return 1.0 + backward + (1.0 if train.gradient_checkpointing else 0.0)


def estimate_steps(inputs: PlanInputs) -> int:
    """Estimate the optimizer steps of a run."""
    train = inputs.recipe.train
    rows = inputs.corpus.num_bytes / inputs.row_bytes
    return train.epochs * math.ceil(rows / train.rows_per_step)


def count_readers(num_workers: int) -> float:
    """Bound the average number of training workers that read each shard.

    The rows of a step come from `SHUFFLE_STREAMS` shards at a time, and a worker reads the shards
    of its own rows only.
    """
    return 1.0 if num_workers == 1 else 1.0 + num_workers / SHUFFLE_STREAMS


def _of_shards(per_shard: Requests, shards: int) -> Requests:
    requests = per_shard.times(shards)
    return replace(requests, lists=DATA_SET_PAGES * shards / PAGE_NAMES)


def _share(done: int, shards: int) -> float:
    return min(done / shards, 1.0) if shards else 1.0


def size_checkpoint(size: ModelSize, train: TrainSettings, plan: PlanSettings) -> float:
    """Estimate the bytes of a training checkpoint."""
    per_weight = float(WEIGHT_BYTES) if train.lora is not None else plan.checkpoint_bytes_per_weight
    return size.parameters * per_weight


def forward_memory(
    size: ModelSize, batch_tokens: int, chunk_positions: int, plan: PlanSettings
) -> float:
    """Estimate the GPU memory for scoring, in bytes: weights, one layer's activations, logits."""
    activations = batch_tokens * size.width * plan.forward_bytes_per_unit
    logits = chunk_positions * size.vocab * LOGITS_BYTES * LOGITS_COPIES
    return size.parameters * WEIGHT_BYTES + activations + logits


def train_memory(size: ModelSize, recipe: Recipe) -> float:
    """Estimate the GPU memory of one worker that trains a model in bfloat16, in bytes.

    ZeRO divides optimizer states from stage 1 on, gradients from 2, weights at 3 (Rajbhandari et
    al. 2020, arXiv 1910.02054, section 5). Activations are those of Korthikanti et al. 2022
    (arXiv 2205.05198, equation 1), or one input per layer with gradient checkpointing.
    """
    train, plan = recipe.train, recipe.plan
    shards = [train.num_workers if train.zero_stage >= stage else 1 for stage in (1, 2, 3)]
    optimizer = 0.0 if train.offload else plan.optimiser_bytes_per_weight / shards[0]
    gradients = WEIGHT_BYTES / shards[1]
    weights = WEIGHT_BYTES / shards[2]
    if train.lora is not None:
        optimizer = gradients = 0.0  # adapters have about 1 % of the weights
    tokens = train.micro_batch_sequences * (train.sequence_tokens or recipe.corpus.max_tokens)
    unit = plan.train_bytes_per_unit
    per_layer = WEIGHT_BYTES * size.layers + unit if train.gradient_checkpointing else None
    activations = tokens * size.width * (per_layer or unit * size.layers)
    chunk = train.chunk_positions or GPU_CHUNK_POSITIONS
    logits = chunk * size.vocab * LOGITS_BYTES * LOGITS_COPIES
    return size.parameters * (optimizer + gradients + weights) + activations + logits
