"""Full distributions, computed while training reads its rows and never stored.

Positions, selected sources and alignment (`bytes`) are those of the stored records, but a source
gives its probabilities of the whole vocabulary in place of the top k.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int

from benchmarks.fusion.training import PACKING
from rayfuse.align.matches import match_positions
from rayfuse.align.method import Alignment
from rayfuse.align.token_spans import PlacedTokens, place_tokens
from rayfuse.fuse.reader import FusedRows, ShardReader
from rayfuse.models.batching import pad_rows
from rayfuse.models.causal_lm import CausalLM
from rayfuse.storage.codec import TopK, flatten_column
from rayfuse.train.batches import MicroBatch, StepPlan, build_micro_batches
from rayfuse.train.order import count_steps, order_rows


@dataclass(frozen=True)
class FullSource:
    """A source model and the alignment of its tokens with the target's."""

    lm: CausalLM
    known_ids: torch.Tensor
    alignment: Alignment
    source: PlacedTokens
    target: PlacedTokens
    source_at: Int[np.ndarray, " target_tokens"]
    """The source position that each target position learns from; -1 for none."""
    continuation: Float[np.ndarray, " target_tokens"]
    """Probability of the other source tokens that spell the target's next token."""
    is_mapped: bool
    """Give probabilities of the target's tokens; else of the source's own, for other libraries'
    losses."""

    def read(
        self, at: Int[np.ndarray, " positions"], row: int
    ) -> Float[torch.Tensor, "positions target_vocab_plus_1"]:
        """Compute the probabilities of all target tokens at positions of a row, then the tail.

        Args:
            at: Positions of the shard at which this source is selected.
            row: The row of all these positions.
        """
        start, stop = self.source.offsets[row : row + 2]
        ids = self.source.ids[start:stop]
        with torch.inference_mode():
            hidden = self.lm.hidden_states(pad_rows([ids]).to(self.lm.device))[0]
            logits = self.lm.logits(hidden[self.source_at[at] - start])
            logits[:, ~self.known_ids] = -torch.inf
            probs = logits.softmax(1)
        if self.is_mapped:
            return self._map(probs, at)
        vocab_size = len(self.alignment.target.lengths)
        assert probs.shape[1] == vocab_size, "the study's vocabularies have one size"
        return torch.nn.functional.pad(probs, (0, 1))

    def _map(
        self, probs: Float[torch.Tensor, "positions head"], at: Int[np.ndarray, " positions"]
    ) -> Float[torch.Tensor, "positions target_vocab_plus_1"]:
        vocab_size = len(self.alignment.target.lengths)
        device = probs.device
        source_at = self.source_at[at]
        # A map has one view for each difference in prefix spaces between source and target.
        views = self.target.next_has_prefix_space[at].astype(np.int8)
        views -= self.source.next_has_prefix_space[source_at].astype(np.int8)
        mapped = torch.zeros(len(at), vocab_size + 1, device=device)
        for view in np.unique(views):
            goals = self.alignment.maps[view, :-1].astype(np.int64)
            goals = torch.from_numpy(np.where(goals < 0, vocab_size, goals)).to(device)
            rows = torch.from_numpy(np.flatnonzero(views == view)).to(device)
            part = torch.zeros(len(rows), vocab_size + 1, device=device)
            part.index_add_(1, goals, probs[rows, : len(goals)])
            mapped[rows] = part
        first_ids = self.source.ids[source_at + 1].astype(np.int64)
        goals = self.alignment.maps[views, first_ids].astype(np.int64)
        here = torch.arange(len(at), device=device)
        first = probs[here, torch.from_numpy(first_ids).to(device)]
        chain = first * torch.from_numpy(self.continuation[at]).to(device)
        true_ids = torch.from_numpy(self.target.ids[at + 1].astype(np.int64)).to(device)
        mapped[here, torch.from_numpy(np.where(goals < 0, vocab_size, goals)).to(device)] -= first
        mapped[here, true_ids] += chain
        mapped[:, -1] += first - chain
        return mapped.clamp_(min=0)


def place_full_source(
    lm: CausalLM,
    alignment: Alignment,
    corpus: pa.Table,
    captured: pa.Table,
    *,
    is_mapped: bool = True,
) -> FullSource:
    """Prepare a source to be asked about a shard's rows; see `FullSource`."""
    texts = [text.encode() for text in corpus["text"].to_pylist()]
    ends = corpus["ends_document"].to_pylist()
    target = place_tokens(*flatten_column(corpus, "target_ids"), texts, alignment.target, ends)
    source = place_tokens(*flatten_column(captured, "token_ids"), texts, alignment.source, ends)
    matches = match_positions(source, target)
    source_at = np.full(len(target.ids), -1, dtype=np.int64)
    source_at[matches.target_at] = matches.source_at
    logprobs = flatten_column(captured, "next_logprobs")[0].astype(np.float32)
    totals = np.concatenate([[0.0], np.cumsum(logprobs, dtype=np.float64)])
    rest = totals[matches.source_stop] - totals[matches.source_at + 1]
    continuation = np.ones(len(target.ids), dtype=np.float32)
    continuation[matches.target_at] = np.exp(np.minimum(rest, 0.0))
    tokenizer = alignment.source.tokenizer
    assert tokenizer is not None
    known = torch.zeros(lm.head.out_features, dtype=torch.bool, device=lm.device)
    known[: tokenizer.vocab_size] = torch.from_numpy(tokenizer.known_ids()).to(lm.device)
    return FullSource(lm, known, alignment, source, target, source_at, continuation, is_mapped)


def iterate_full_steps(
    reader: ShardReader, sources: list[FullSource], plan: StepPlan
) -> Iterator[list[MicroBatch]]:
    """Yield the steps of all epochs over one shard, in the order of a real run."""
    reader.keep({0})
    for epoch in range(plan.epochs):
        order = order_rows(reader.rows_per_shard, seed=plan.seed, epoch=epoch)
        for number in range(count_steps(sum(reader.rows_per_shard), plan.rows_per_step, 1)):
            numbers = order.step(number, plan.rows_per_step).share(0, 1)
            rows = reader.read_rows(numbers)
            yield build_micro_batches(_widen(rows, numbers[:, 1], sources), PACKING)


def _widen(
    rows: FusedRows, numbers: Int[np.ndarray, " rows"], sources: list[FullSource]
) -> FusedRows:
    """Replace the distributions of rows by ones with an entry for every target token."""
    target = sources[0].target
    num_tokens, vocab_size = len(rows.token_ids), len(sources[0].alignment.target.lengths)
    probs = np.zeros((num_tokens, vocab_size + 1), dtype=np.float32)
    ends = np.cumsum(rows.lengths)
    for row, start, stop in zip(numbers.tolist(), ends - rows.lengths, ends, strict=True):
        selected = rows.selected[start:stop]
        for number, source in enumerate(sources):
            here = np.flatnonzero(selected == number)
            if len(here):
                probs[start + here] = source.read(target.offsets[row] + here, row).cpu().numpy()
    ids = np.broadcast_to(np.arange(vocab_size, dtype=np.int32), (num_tokens, vocab_size))
    return replace(rows, top=TopK(ids, probs[:, :-1], probs[:, -1].copy()))
