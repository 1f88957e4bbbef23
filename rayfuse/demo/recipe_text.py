"""The demo's recipe as a user reads and copies it."""

import json
from collections.abc import Sequence
from pathlib import Path

from rayfuse.demo.specs import CONTEXT_TOKENS, ModelSpec

TEMPLATE = """\
# The recipe of `rayfuse demo`. Copy it for a run of your own; the demo writes this file anew.
#   rayfuse run {file}                     goes on where it stopped; does nothing if all is done
#   rayfuse run {file} train.lambda=0.9    changes one setting; what it does not touch is kept
storage: {storage}
seed: {seed}

corpus:
  documents: {corpus}  # fresh text: no model here has seen it
  max_tokens: {max_tokens}  # of a row, by every tokenizer's count; the tiny models take no more
  shard_tokens: {shard_tokens}  # small, so that even this corpus has several shards

target:  # it learns
  model: {target}

sources:  # they are what it learns from; each knows one of the three domains best
{sources}

capture:
  batch_tokens: 4096  # of one forward pass: a CPU gains nothing from more

train:  # `lambda`, `fuse` and `align` are left at their defaults
  learning_rate: {learning_rate}  # 1e-5 suits billions of weights; this target has a million
  warmup_share: 0.05
  epochs: {epochs}
  rows_per_step: {rows}

evaluate:
  documents: {held_out}  # seen by nobody, not even in training
  batch_tokens: 4096
"""

SHARD_TOKENS = 40_000
LEARNING_RATE = 0.002
ROWS_PER_STEP = 8
EPOCHS = 2


def render_recipe(root: Path, seed: int, specs: Sequence[ModelSpec]) -> str:
    """Return the YAML of the demo's recipe.

    Args:
        root: The storage folder; models and documents are below its `demo`.
        seed: Of the training's order.
        specs: The sources, and last the target.
    """
    folder = root / "demo"
    *sources, target = specs
    lines = [f"  - {{name: {spec.name}, model: {_quote(folder / spec.name)}}}" for spec in sources]
    return TEMPLATE.format(
        file=root / "recipe.yaml",
        storage=_quote(root),
        seed=seed,
        corpus=_quote(folder / "corpus.jsonl"),
        max_tokens=CONTEXT_TOKENS,
        shard_tokens=SHARD_TOKENS,
        target=_quote(folder / target.name),
        sources="\n".join(lines),
        learning_rate=LEARNING_RATE,
        epochs=EPOCHS,
        rows=ROWS_PER_STEP,
        held_out=_quote(folder / "held_out.jsonl"),
    )


def _quote(path: Path) -> str:
    """Return a path as YAML reads it whatever is in it: a JSON string is one of YAML's."""
    return json.dumps(str(path))
