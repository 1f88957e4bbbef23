"""A setup -> the lines of a plan: tokens, shards, bytes, requests, operations, memory."""

import math
from collections.abc import Iterator
from dataclasses import replace

from rayfuse.config.models import SourceSettings
from rayfuse.config.plan import PlanSettings
from rayfuse.config.train import TrainSettings
from rayfuse.plan.inputs import Model, Setup
from rayfuse.plan.memory import WEIGHT_BYTES, forward_memory, train_memory
from rayfuse.plan.model_size import ModelSize
from rayfuse.plan.work import GpuWork, Requests, Work
from rayfuse.train.order import SHUFFLE_STREAMS

PAGE_NAMES = 1000
"""Names in one answer to a LIST."""

CORPUS_SHARD = Requests(puts=2.0, gets=2.0)
"""Is it committed? The shard and its record are written, the record read, for the manifest."""

CAPTURE_SHARD = Requests(puts=2.0, gets=4.0)
"""The same, and the corpus' record and shard."""

ALIGN_SHARD = Requests(puts=2.0, gets=6.0)
"""The same, and the captured record and shard."""

DATA_SET_PAGES = 6
"""Times that the names of a data set are listed in the course of a run, about."""


def list_work(setup: Setup) -> Iterator[Work]:
    """Yield the lines of a plan, in the order of the stages."""
    recipe, corpus = setup.recipe, setup.corpus
    yield _plan_corpus(setup)
    for model, source in zip(setup.sources, recipe.sources, strict=True):
        yield _plan_capture(setup, model, source)
    for source in recipe.sources:
        yield _plan_align(setup, source.name)
    for name in ("fused", "clm") if recipe.train.baseline else ("fused",):
        yield _plan_train(setup, name)
    if corpus.shards:
        yield _plan_evaluate(setup)


def _plan_corpus(setup: Setup) -> Work:
    plan, text = setup.recipe.plan, setup.corpus.num_bytes + setup.held_out.num_bytes
    shards = setup.corpus.shards + setup.held_out.shards
    done = setup.done.get(("corpus", ""), 0) + setup.done.get(("corpus", "held-out"), 0)
    tokenizers = 1 + len(setup.sources)
    return Work(
        stage="corpus",
        name="",
        tokens=text / setup.target.bytes_per_token,
        shards=shards,
        done=_share(done, shards),
        stored_bytes=text * plan.corpus_bytes_per_byte,
        requests=_of_shards(CORPUS_SHARD, shards),
        core_hours=text * tokenizers / plan.tokenise_bytes_per_core_second / 3600,
    )


def _plan_capture(setup: Setup, model: Model, source: SourceSettings) -> Work:
    recipe, shards = setup.recipe, setup.corpus.shards
    plan, capture = recipe.plan, recipe.capture
    tokens = setup.corpus.num_bytes / model.bytes_per_token
    record = plan.captured_bytes_per_token
    record += plan.captured_bytes_per_entry * capture.kept_entries
    record += plan.captured_bytes_per_draw * capture.num_draws
    batch_tokens = source.batch_tokens or capture.batch_tokens
    return Work(
        stage="capture",
        name=source.name,
        tokens=tokens,
        shards=shards,
        done=_share(setup.done.get(("capture", source.name), 0), shards),
        stored_bytes=tokens * record,
        requests=_of_shards(CAPTURE_SHARD, shards),
        gpu=GpuWork(
            flops=tokens * model.size.forward_flops(setup.row_tokens(model)),
            is_training=False,
            memory_bytes=forward_memory(model.size, batch_tokens, capture.chunk_positions, plan),
            gpus=1.0 if source.gpus is None else source.gpus,
            actors=source.max_actors or source.min_actors,
            accelerator_type=source.accelerator_type,
            needs_bfloat16=source.dtype in ("auto", "bfloat16"),
        ),
    )


def _plan_align(setup: Setup, source: str) -> Work:
    recipe, shards = setup.recipe, setup.corpus.shards
    plan = recipe.plan
    tokens = setup.corpus.num_bytes / setup.target.bytes_per_token
    entries = recipe.capture.kept_entries + recipe.capture.num_draws
    is_mapped = recipe.align.method in ("min_edit_distance", "cooccurrence")
    rate = plan.mapped_tokens_per_core_second if is_mapped else plan.align_tokens_per_core_second
    return Work(
        stage="align",
        name=source,
        tokens=tokens,
        shards=shards,
        done=_share(setup.done.get(("align", source), 0), shards),
        stored_bytes=tokens
        * (plan.aligned_bytes_per_token + plan.aligned_bytes_per_entry * entries),
        requests=_of_shards(ALIGN_SHARD, shards),
        core_hours=tokens / rate / 3600,
    )


def _plan_train(setup: Setup, name: str) -> Work:
    recipe, size = setup.recipe, setup.target.size
    plan, train = recipe.plan, recipe.train
    is_fused = name == "fused" and train.is_fused
    tokens = setup.corpus.num_bytes / setup.target.bytes_per_token * train.epochs
    flops = size.forward_flops(setup.row_tokens(setup.target)) * train_passes(train)
    checkpoint = size_checkpoint(size, train, plan)
    num_checkpoints = max(count_steps(setup) - 1, 0) // train.checkpoint_every_steps
    parts = math.ceil(checkpoint / plan.upload_part_bytes) + 3 * train.num_workers
    sources = len(setup.sources) if is_fused else 0
    return Work(
        stage="train",
        name=name,
        tokens=tokens,
        shards=setup.corpus.shards,
        done=float(setup.done.get(("train", name), 0)),
        stored_bytes=size.parameters * WEIGHT_BYTES
        + checkpoint * min(num_checkpoints, train.keep_checkpoints + 1),
        requests=Requests(
            puts=num_checkpoints * parts + size.parameters * WEIGHT_BYTES / plan.upload_part_bytes,
            gets=train.epochs
            * setup.corpus.shards
            * (1 + sources)
            * count_readers(train.num_workers),
            lists=2 * (1 + sources) * setup.corpus.shards / PAGE_NAMES + num_checkpoints,
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


def _plan_evaluate(setup: Setup) -> Work:
    """Return the line of evaluation: every source, the target, and what is trained or merged."""
    recipe, held_out = setup.recipe, setup.held_out
    names = ["fused", "clm"] if recipe.train.baseline else ["fused"]
    if setup.layout is not None and "merged" in setup.layout.evaluations:
        names.append("merged")
    models = [*setup.sources, *[setup.target] * (1 + len(names))]
    tokens = [held_out.num_bytes / model.bytes_per_token for model in models]
    flops = [
        each * model.size.forward_flops(setup.row_tokens(model))
        for each, model in zip(tokens, models, strict=True)
    ]
    batch, chunk = recipe.evaluate.batch_tokens, recipe.capture.chunk_positions
    ensemble = len(setup.sources) if len(setup.sources) > 1 else 0
    return Work(
        stage="evaluate",
        name="",
        tokens=sum(tokens),
        shards=held_out.shards,
        done=float(setup.done.get(("evaluate", ""), 0)),
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
    """Return what a training step takes of a token, in forward passes."""
    backward = 1.0 if train.lora is not None else 2.0  # adapters: no gradients of the weights
    return 1.0 + backward + (1.0 if train.gradient_checkpointing else 0.0)


def count_steps(setup: Setup) -> int:
    """Return the optimiser steps of a run."""
    train = setup.recipe.train
    rows = setup.corpus.num_bytes / setup.row_bytes
    return train.epochs * math.ceil(rows / train.rows_per_step)


def count_readers(num_workers: int) -> float:
    """Return how many of a training's workers read each shard, on average, at most.

    Rows of a step come from `SHUFFLE_STREAMS` shards at a time; a worker reads those that its rows
    are in.
    """
    return 1.0 if num_workers == 1 else 1.0 + num_workers / SHUFFLE_STREAMS


def _of_shards(each: Requests, shards: int) -> Requests:
    all_of_them = each.times(shards)
    return replace(all_of_them, lists=DATA_SET_PAGES * shards / PAGE_NAMES)


def _share(done: int, shards: int) -> float:
    return min(done / shards, 1.0) if shards else 1.0


def size_checkpoint(size: ModelSize, train: TrainSettings, plan: PlanSettings) -> float:
    """Return the bytes of a checkpoint of training."""
    per_weight = float(WEIGHT_BYTES) if train.lora is not None else plan.checkpoint_bytes_per_weight
    return size.parameters * per_weight
