"""One process of a training without Ray: `zero_worker.py RANK WORLD PORT OUT START STAGE...`.

With a START of 0 it trains from the beginning, and makes a checkpoint after step 2; with 2 it goes
on from what other processes, as many or not, have left there.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from rayfuse.config.train import TrainSettings
from rayfuse.fuse.reader import FusedRows, join_rows
from rayfuse.models.causal_lm import split_head
from rayfuse.storage.codec import TopK
from rayfuse.train import deepspeed_engine
from rayfuse.train.batches import Packing, Step, build_micro_batches
from rayfuse.train.checkpoint import CheckpointRecord
from rayfuse.train.deepspeed_engine import build_engine, save_model
from rayfuse.train.loop import Objective, StepMetrics, train_steps
from rayfuse.train.model import FusionModel
from rayfuse.train.pickle_guard import check_pickle
from rayfuse.train.resume import TAG, LocalCheckpoint, convert_checkpoint, has_parts
from tests.models.tiny_models import tiny_config

VOCAB, STEPS, ROWS, CHECKPOINT = 97, 4, 8, 2
RECORD = CheckpointRecord("step_2-x", CHECKPOINT, 2, 0, {}, None, {})


def random_row(random: np.random.Generator) -> FusedRows:
    length = int(random.integers(3, 20))
    ids = np.stack([random.permutation(VOCAB)[:5] for _ in range(length)]).astype(np.int32)
    probs = random.dirichlet(np.ones(6), size=length)
    has_signal = random.random(length) < 0.7
    selected = np.where(has_signal, random.integers(2, size=length), -1)
    top = TopK(ids, probs[:, :5], probs[:, 5])
    token_ids = random.integers(0, VOCAB, length).astype(np.int32)
    return FusedRows(token_ids, np.array([length]), top, selected)


def deal_steps(rank: int, num_workers: int) -> list[Step]:
    """Deal the same rows of every step to any number of workers; the last step is short."""
    random = np.random.default_rng(7)
    steps = [[random_row(random) for _ in range(ROWS)] for _ in range(STEPS)]
    steps[-1] = steps[-1][:1]  # with two workers, one has nothing
    packing = Packing(sequence_tokens=24, sequences=2, is_packed=True)
    shares = [np.array_split(np.arange(len(rows)), num_workers)[rank] for rows in steps]
    return [
        Step(build_micro_batches(join_rows([rows[i] for i in share]), packing), "id")
        for rows, share in zip(steps, shares, strict=True)
    ]


def train_once(
    family: str, tied: bool, stage: int, rank: int, num_workers: int, start: int
) -> list[float]:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(tiny_config(family, VOCAB, tied=tied))
    settings = TrainSettings(
        rows_per_step=ROWS,
        num_workers=num_workers,
        zero_stage=stage,
        learning_rate=1e-2,
        chunk_positions=7,
    )
    root = Path(os.environ["MODEL_FOLDER"])
    found = LocalCheckpoint(root / f"checkpoint-{family}-{stage}", RECORD)
    if start:
        for path in (found.folder / TAG).iterdir():
            check_pickle(path)
    if start and has_parts(found.folder):
        convert_checkpoint(found.folder)
    engine = build_engine(
        FusionModel(split_head(model, name=family), settings, num_sources=2),
        settings,
        num_steps=STEPS,
        num_workers=num_workers,
        device="cpu",
        load_universal=found.is_universal,
    )
    if start:
        found.load(engine)
        decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
        assert decays == [settings.weight_decay, 0.0]
    losses: list[float] = []

    def after_step(metrics: StepMetrics) -> None:
        losses.append(metrics.loss)
        if metrics.step == CHECKPOINT and not start:
            engine.save_checkpoint(str(found.folder), tag=TAG, save_latest=False)

    train_steps(
        engine,
        iter(deal_steps(rank, num_workers)[start:]),
        Objective(0.9, 1.0, STEPS, ("one", "two")),
        first_step=start,
        num_workers=num_workers,
        after_step=after_step,
    )
    if stage == 3 and num_workers > 1:
        weight = engine.module.head_loss.weight
        assert weight.numel() == 0, "the head's weight is not partitioned"
    save_model(engine, str(root / f"{family}-{stage}-{num_workers}"), rank=rank)
    return losses


def shard_even_tiny_weights() -> None:
    """Let ZeRO-3 partition every parameter; by default it keeps small ones complete."""
    plain = deepspeed_engine.deepspeed_config

    def with_threshold(*args: Any) -> dict[str, Any]:
        config = plain(*args)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    deepspeed_engine.deepspeed_config = with_threshold


def main() -> None:
    rank, num_workers, port, out, start, *stages = sys.argv[1:]
    os.environ |= {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": num_workers,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    torch.set_num_threads(1)
    shard_even_tiny_weights()
    torch.distributed.init_process_group("gloo")
    losses = {
        f"{family}-{stage}": train_once(
            family, tied, int(stage), int(rank), int(num_workers), int(start)
        )
        for family, tied in (("llama", False), ("gpt2", True))
        for stage in stages
    }
    if rank == "0":
        Path(out).write_text(json.dumps(losses))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
