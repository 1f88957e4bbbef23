"""Changes of training that are tried in regime R1, and are no settings of rayfuse.

A unit's setting `trial` names them with their values; see `Trial`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Int
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


@dataclass(frozen=True)
class Span:
    """The indices of a training row in the flat arrays of a shard."""

    tokens: Int[np.ndarray, " length"]
    tops: Int[np.ndarray, " length"]
    """Of the distribution of each token's next one."""


def plan_trial_steps(
    rows: FusedRows, corpus: pa.Table, plan: StepPlan, trial: Trial
) -> list[list[Span]]:
    """Plan the rows of each step of all epochs over one shard.

    Args:
        rows: All rows of the shard.
        corpus: The same rows, as stored.
        plan: As of a real run.
        trial: What is changed.
    """
    stops = np.cumsum(rows.lengths)
    spans = [Span(at, at) for at in map(np.arange, (stops - rows.lengths).tolist(), stops.tolist())]
    ends_document = np.array(corpus["ends_document"].to_pylist())
    random = np.random.default_rng(plan.seed)
    steps: list[list[Span]] = []
    for epoch in range(plan.epochs):
        order = order_rows([len(spans)], seed=plan.seed, epoch=epoch).rows[:, 1]
        chosen = [spans[number] for number in order.tolist()]
        if trial.views and epoch:
            chosen = cut_anew(spans, ends_document, random)
            random.shuffle(chosen)  # pyright: ignore[reportArgumentType]
        size = plan.rows_per_step
        steps += [chosen[first : first + size] for first in range(0, len(chosen), size)]
    return steps


def iterate_trial_steps(
    rows: FusedRows, steps: list[list[Span]], trial: Trial, seed: int
) -> Iterator[list[MicroBatch]]:
    """Yield the micro-batches of each step."""
    random = np.random.default_rng(seed)
    for spans in steps:
        batches = build_micro_batches(_take(rows, spans), PACKING)
        if trial.noise:
            batches = [
                replace(batch, token_ids=add_noise(batch.token_ids, rows, trial.noise, random))
                for batch in batches
            ]
        yield batches


def read_trial_rows(reader: ShardReader, copy: ShardReader | None, trial: Trial) -> FusedRows:
    """Read a shard, with the share of the copy if there is one."""
    rows = _read_all(reader)
    return rows if copy is None else mix_with_copy(rows, _read_all(copy), trial.copy_share)


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
    rows: list[Span], ends_document: Bool[np.ndarray, " rows"], random: np.random.Generator
) -> list[Span]:
    """Cut each document into rows at other places, at most a row's length apart.

    Each row begins with the start token. The distribution of its first token is the stored one,
    which was made with the text before.

    Args:
        rows: The rows as stored, each with a start token.
        ends_document: Whether a row is its document's last.
        random: Draws the first cut of each document.
    """
    longest = max(len(row.tokens) for row in rows) - 1  # beside the start token
    spans: list[Span] = []
    first = 0
    for last in np.flatnonzero(ends_document).tolist():
        document, first = rows[first : last + 1], last + 1
        words = np.concatenate([row.tokens[1:] for row in document])
        predicted_at = np.concatenate([row.tokens[:-1] for row in document])
        stop = len(words)
        offset = int(random.integers(longest // 4, longest + 1)) if stop > longest else stop
        for a, b in pairwise([0, *range(offset, stop, longest), stop]):
            if b > a:
                start = document[0].tokens[:1]
                tops = np.append(predicted_at[a:b], words[b - 1])  # the last one is never used
                spans.append(Span(np.append(start, words[a:b]), tops))
    return spans


def _take(rows: FusedRows, spans: list[Span]) -> FusedRows:
    tokens = np.concatenate([span.tokens for span in spans])
    tops = np.concatenate([span.tops for span in spans])
    top = TopK(rows.top.ids[tops], rows.top.probs[tops], rows.top.tail[tops])
    lengths = np.array([len(span.tokens) for span in spans])
    return FusedRows(rows.token_ids[tokens], lengths, top, rows.selected[tops])


def add_noise(
    token_ids: Int[np.ndarray, "batch seq_len"],
    rows: FusedRows,
    share: float,
    random: np.random.Generator,
) -> Int[np.ndarray, "batch seq_len"]:
    """Replace a share of tokens, but no row's first, by random ones of the shard."""
    is_replaced = random.random(token_ids.shape) < share
    is_replaced[:, 0] = False
    drawn = random.choice(rows.token_ids, token_ids.shape)
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
