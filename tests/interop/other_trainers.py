"""What the tests of other trainers share: the blocks of their page, and the losses of our own."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM

from rayfuse.config.train import TrainSettings
from rayfuse.fuse.reader import FusedRows
from rayfuse.models.causal_lm import split_head
from rayfuse.storage.codec import TopK
from rayfuse.train.batches import Packing, Step, build_micro_batches
from rayfuse.train.deepspeed_engine import build_engine
from rayfuse.train.loop import Objective, StepMetrics, train_steps
from rayfuse.train.model import FusionModel
from tests.docs.blocks import read_blocks

PAGE = "docs/other-trainers.md"
OPTIONAL = ("lightning", "trl")
"""Libraries that a user may lack: a block of the page imports each."""
INSTALLED = tuple(name for name in OPTIONAL if find_spec(name) is not None)


def needs(block: str) -> str | None:
    """Name the optional library that a block imports."""
    return next((name for name in OPTIONAL if f"import {name}\n" in block), None)


def run_page(
    folder: Path, libraries: Sequence[str], replacements: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Run the blocks of the page one after the other; yield, after each, the names defined so far.

    Args:
        folder: It has the `storage` of a run, and its `target`.
        libraries: The optional ones whose blocks are run, too.
        replacements: Text of the page, each to be found once, and what replaces it.
    """
    names: dict[str, Any] = {"__name__": "block"}
    text = {block: needs(block) for block in read_blocks(PAGE, "python")}
    for old, new in (replacements or {}).items():
        assert sum(block.count(old) for block in text) == 1, old
        text = {block.replace(old, new): library for block, library in text.items()}
    for block, library in text.items():
        if library is None or library in libraries:
            with working_in(folder):
                exec(compile(block, "block", "exec"), names)
            yield names


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Work in a folder for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def join(rows: Sequence[dict[str, Any]]) -> FusedRows:
    """Join rows to what our own trainer is given."""
    return FusedRows(
        token_ids=np.concatenate([row["token_ids"] for row in rows]),
        lengths=np.array([len(row["token_ids"]) for row in rows]),
        top=TopK(
            ids=np.concatenate([row["top_ids"] for row in rows]),
            probs=np.concatenate([row["top_probs"] for row in rows]),
            tail=np.concatenate([row["tail_probs"] for row in rows]),
        ),
        selected=np.concatenate([row["sources"] for row in rows]),
    )


def train_own(
    folder: Path, batches: Sequence[Sequence[dict[str, Any]]], *, rate: float
) -> list[float]:
    """Train the target in our own trainer, on one batch of rows a step, and return its losses.

    It needs the fixture `process_group`.
    """
    settings = TrainSettings(
        learning_rate=rate, schedule="constant", warmup_share=0.0, weight_decay=0.0, zero_stage=0
    )
    lm = split_head(AutoModelForCausalLM.from_pretrained(folder / "target"), name="target")
    lm.model.train()
    num_steps = len(batches)
    engine = build_engine(
        FusionModel(lm, settings, num_sources=2),
        settings,
        num_steps=num_steps,
        num_workers=1,
        device="cpu",
    )
    steps = [
        Step(build_micro_batches(join(rows), Packing(64, len(rows), True)), "") for rows in batches
    ]
    seen: list[StepMetrics] = []
    train_steps(
        engine,
        iter(steps),
        Objective(settings.clm_weight, settings.temperature, num_steps, ("neox", "gpt2")),
        first_step=0,
        num_workers=1,
        after_step=seen.append,
    )
    return [metrics.loss for metrics in seen]
