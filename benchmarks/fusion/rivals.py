"""Losses of other libraries between different vocabularies, for comparison alone.

ULD (Boizard et al., arXiv 2402.12030): both distributions are sorted, and their L1 distance is
added to the cross-entropy, times 1.5. GOLD (TRL): tokens that both vocabularies spell alike are
compared by the Jensen-Shannon divergence, all others by the sorted distance; each part is weighted
by its share of the source's vocabulary, beside the cross-entropy. Both are used here at the
positions where a token of the source begins with one of the target, where those libraries align by
index or by merged spans, and from the source that rayfuse selects for each row (`min_ce`): neither
has a rule for several sources.
"""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from rayfuse.align.method import Alignment
from rayfuse.models.causal_lm import CausalLM
from rayfuse.train.batches import MicroBatch
from rayfuse.train.loss import LossWeights

RivalName = Literal["uld", "gold"]

ULD_WEIGHT = 1.5
"""Factor of the sorted distance beside the cross-entropy, as published."""

LOWEST_PROB = 1e-12


class RivalModel(nn.Module):
    """A target with such a loss; its micro-batches hold the sources' own distributions."""

    def __init__(self, lm: CausalLM, name: RivalName, alignments: list[Alignment]) -> None:
        """Wrap a target.

        Args:
            lm: The target; its weights are trained in place.
            name: The loss.
            alignments: Of each source, for the tokens that both vocabularies spell alike.
        """
        super().__init__()
        self.model, self.lm, self.name = lm.model, [lm], name
        self.matched = [_match_tokens(alignment) for alignment in alignments]

    def forward(self, batch: MicroBatch, weights: LossWeights) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the scaled loss, and the unscaled sum of the cross-entropy."""
        lm = self.lm[0]
        hidden = lm.hidden_states(torch.from_numpy(batch.token_ids).long().to(lm.device), None)
        positions = torch.from_numpy(batch.positions).to(lm.device)
        logits = lm.logits(hidden.flatten(0, 1)[positions]).float()
        next_ids = torch.from_numpy(batch.next_ids).long().to(lm.device)
        clm = nn.functional.cross_entropy(logits, next_ids, reduction="sum")
        loss = clm
        for number, matched in enumerate(self.matched):
            own = np.flatnonzero(batch.sources == number)
            if len(own):
                theirs = torch.from_numpy(batch.top.probs[own]).to(lm.device)
                ours = logits[torch.from_numpy(own).to(lm.device)].softmax(1)
                if self.name == "uld":
                    loss = loss + ULD_WEIGHT * sorted_distance(theirs, ours)
                else:
                    their_ids, our_ids = (ids.to(lm.device) for ids in matched)
                    loss = loss + hybrid_distance(theirs, ours, their_ids, our_ids)
        return weights.scale * loss, clm.detach()[None]


def sorted_distance(
    theirs: Float[torch.Tensor, "positions their_vocab"],
    ours: Float[torch.Tensor, "positions vocab"],
) -> Float[torch.Tensor, ""]:
    """Sum the L1 distances of sorted distributions; the shorter one is padded with zeros."""
    width = max(theirs.shape[1], ours.shape[1])
    padded = [nn.functional.pad(probs, (0, width - probs.shape[1])) for probs in (theirs, ours)]
    theirs, ours = (probs.sort(dim=1, descending=True).values for probs in padded)
    return (theirs - ours).abs().sum()


def hybrid_distance(
    theirs: Float[torch.Tensor, "positions their_vocab"],
    ours: Float[torch.Tensor, "positions vocab"],
    their_ids: torch.Tensor,
    our_ids: torch.Tensor,
) -> Float[torch.Tensor, ""]:
    """Sum the Jensen-Shannon divergence of matched tokens and the sorted distance of the others."""
    p, q = theirs[:, their_ids], ours[:, our_ids]
    log_middle = ((p + q) / 2).clamp_min(LOWEST_PROB).log()
    divergence = torch.xlogy(p, p) - p * log_middle
    divergence = divergence + q * (q.clamp_min(LOWEST_PROB).log() - log_middle)
    share = len(their_ids) / theirs.shape[1]
    is_other = [torch.ones(probs.shape[1], dtype=torch.bool) for probs in (theirs, ours)]
    is_other[0][their_ids.cpu()], is_other[1][our_ids.cpu()] = False, False
    distance = sorted_distance(
        theirs[:, is_other[0].to(theirs.device)], ours[:, is_other[1].to(ours.device)]
    )
    return share * divergence.sum() / 2 + (1 - share) * distance


def _match_tokens(alignment: Alignment) -> tuple[torch.Tensor, torch.Tensor]:
    """List the tokens that both vocabularies spell alike: the source's ids, then the target's."""
    source, target = alignment.source.tokenizer, alignment.target.tokenizer
    assert source is not None and target is not None
    goals = target.list_by_bytes()
    pairs = [
        (token_id, goals[spelled])
        for token_id, spelled in enumerate(source.token_bytes)
        if spelled and spelled in goals
    ]
    ids = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return ids[:, 0], ids[:, 1]
