"""Changes of training that are tried in regime R1, and are no settings of rayfuse.

A unit's setting `trial` names them with their values; see `Trial`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int
from torch import nn

from benchmarks.fusion.training import PACKING
from rayfuse.fuse.reader import FusedRows, ShardReader
from rayfuse.fuse.rules import mix
from rayfuse.models.causal_lm import CausalLM
from rayfuse.storage.codec import TopK
from rayfuse.train.batches import MicroBatch, StepPlan, build_micro_batches
from rayfuse.train.order import order_rows

DROPPED_MODULES = ("o_proj", "down_proj", "embed_tokens")
"""Outputs of the target's layers that dropout is applied to."""

WARM_UP_STEPS = 10
"""Of the moving average: before, it would hold on to the start."""


@dataclass(frozen=True)
class Trial:
    """What is changed; each at its default changes nothing."""

    copy_share: float = 0.0
    """A fixed share of another model, such as the target's own copy, in every distribution."""
    views: bool = False
    """From the second epoch on, documents are cut into rows at random places."""
    noise: float = 0.0
    """Share of input tokens that are replaced by random ones of the corpus."""
    dropout: float = 0.0
    average: float = 0.0
    """Decay rate of a moving average of the weights, which replaces them at the end."""


def iterate_trial_steps(
    reader: ShardReader, copy: ShardReader | None, corpus: pa.Table, plan: StepPlan, trial: Trial
) -> Iterator[list[MicroBatch]]:
    """Yield the steps of all epochs over one shard.

    Args:
        reader: Reads the corpus with its sources.
        copy: Reads it with the model of `copy_share` alone.
        corpus: The rows.
        plan: As of a real run.
        trial: What is changed.
    """
    rows = _read_all(reader)
    if copy is not None:
        rows = mix_with_copy(rows, _read_all(copy), trial.copy_share)
    stops = np.cumsum(rows.lengths)
    whole = np.stack([stops - rows.lengths, stops], axis=1)
    ends_document = np.array(corpus["ends_document"].to_pylist())
    random = np.random.default_rng(plan.seed)
    for epoch in range(plan.epochs):
        order = order_rows([len(whole)], seed=plan.seed, epoch=epoch).rows[:, 1]
        spans = whole[order]
        if trial.views and epoch:
            spans = cut_anew(whole, ends_document, random)
            random.shuffle(spans)
        for start in range(0, len(spans), plan.rows_per_step):
            part = _take(rows, spans[start : start + plan.rows_per_step])
            batches = build_micro_batches(part, PACKING)
            if trial.noise:
                noisy = [
                    add_noise(batch.token_ids, rows.token_ids, trial.noise, random)
                    for batch in batches
                ]
                batches = [
                    replace(batch, token_ids=ids) for batch, ids in zip(batches, noisy, strict=True)
                ]
            yield batches


def _read_all(reader: ShardReader) -> FusedRows:
    reader.keep({0})
    (num_rows,) = reader.rows_per_shard
    return reader.read_rows(np.stack([np.zeros(num_rows, np.int64), np.arange(num_rows)], axis=1))


def mix_with_copy(rows: FusedRows, copy: FusedRows, share: float) -> FusedRows:
    """Mix a share of a copy into the distributions; alone where the sources have no signal."""
    both, either = rows.has_signal & copy.has_signal, rows.has_signal | copy.has_signal
    of_copy = np.where(both, share, np.where(copy.has_signal, 1.0, 0.0))
    of_rows = np.where(either, 1.0 - of_copy, 0.0)
    selected = np.where(rows.has_signal, rows.selected, np.where(copy.has_signal, 0, -1))
    top = mix([rows.top, copy.top], np.stack([of_rows, of_copy]))
    return replace(rows, top=top, selected=selected.astype(np.int16))


def cut_anew(
    rows: Int[np.ndarray, "rows 2"], ends_document: np.ndarray, random: np.random.Generator
) -> Int[np.ndarray, "spans 2"]:
    """Cut each document of several rows at other places, at most a row's length apart.

    Args:
        rows: Start and end of each row.
        ends_document: Whether a row is its document's last.
        random: Draws the first cut of each document.
    """
    longest = int((rows[:, 1] - rows[:, 0]).max())
    spans: list[tuple[int, int]] = []
    first = 0
    for row in np.flatnonzero(ends_document).tolist():
        start, stop = int(rows[first, 0]), int(rows[row, 1])
        first = row + 1
        offset = int(random.integers(longest // 4, longest + 1)) if stop - start > longest else stop
        cuts = [start, *range(start + offset, stop, longest), stop]
        spans += [(a, b) for a, b in pairwise(cuts) if b - a > 1]
    return np.array(spans)


def _take(rows: FusedRows, spans: Int[np.ndarray, "spans 2"]) -> FusedRows:
    at = np.concatenate([np.arange(start, stop) for start, stop in spans])
    top = TopK(rows.top.ids[at], rows.top.probs[at], rows.top.tail[at])
    return FusedRows(rows.token_ids[at], spans[:, 1] - spans[:, 0], top, rows.selected[at])


def add_noise(
    token_ids: Int[np.ndarray, "batch seq_len"],
    known: Int[np.ndarray, " tokens"],
    share: float,
    random: np.random.Generator,
) -> Int[np.ndarray, "batch seq_len"]:
    """Replace a share of tokens, but no row's first, by random ones of `known`."""
    is_replaced = random.random(token_ids.shape) < share
    is_replaced[:, 0] = False
    drawn = random.choice(known, token_ids.shape)
    return np.where(is_replaced, drawn, token_ids).astype(token_ids.dtype)


def add_dropout(lm: CausalLM, share: float) -> None:
    """Drop a share of the outputs of the target's layers in training."""

    def drop(module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(output, share, training=module.training)

    for name, module in lm.model.named_modules():
        if name.endswith(DROPPED_MODULES):
            module.register_forward_hook(drop)


class MovingAverage:
    """The exponential moving average of a model's weights over the steps."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin with the model's weights."""
        self.model, self.decay, self.steps = model, decay, 0
        self.average = [weights.detach().clone() for weights in model.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + WARM_UP_STEPS))
        for average, weights in zip(self.average, self.model.parameters(), strict=True):
            average.lerp_(weights, 1 - decay)

    @torch.no_grad()
    def replace_weights(self) -> None:
        """Give the model its average."""
        for average, weights in zip(self.average, self.model.parameters(), strict=True):
            weights.copy_(average)
