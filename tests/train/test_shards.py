"""What a shard in memory gives out is what fusing whole rows gives."""

from dataclasses import replace

import numpy as np
import pytest

from rayfuse.config.fuse import FuseSettings
from rayfuse.fuse.reader import OpenShard, OpenSource
from rayfuse.fuse.rules import AlignedRow, choose_cheapest, fuse_row
from rayfuse.storage.codec import encode_probs

TOKENS, LENGTHS = 60, (7, 20, 1, 32)


def open_source(random: np.random.Generator, entries: int) -> OpenSource:
    outcomes = -np.sort(-random.dirichlet(np.ones(entries + 1), size=TOKENS), axis=1)
    ids = np.stack([random.permutation(90)[:entries] for _ in range(TOKENS)]).astype(np.int32)
    ids[random.random(ids.shape) < 0.2] = -1
    return OpenSource(
        has_signal=(random.random(TOKENS) < 0.7) & (ids >= 0).any(axis=1),
        top_ids=ids,
        differences=encode_probs(outcomes[:, :-1]).reshape(ids.shape),
        tail_logprobs=np.log(outcomes[:, -1]).astype(np.float16),
        costs=random.random(TOKENS),
        weight=1.0,
    )


def _widen(said: AlignedRow, entries: int) -> AlignedRow:
    room = ((0, 0), (0, entries - said.top_ids.shape[1]))
    ids = np.pad(said.top_ids, room, constant_values=-1)
    return replace(said, top_ids=ids, top_probs=np.pad(said.top_probs, room))


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("seed", range(5))
def test_the_winners_alone_are_what_fusing_all_sources_gives(seed, tail):
    random = np.random.default_rng(seed)
    sources = tuple(open_source(random, entries) for entries in (4, 6, 1))
    heard = np.stack([np.where(each.has_signal, each.costs, np.inf) for each in sources])
    offsets = np.cumsum([0, *LENGTHS])
    winners = choose_cheapest(heard).astype(np.int16)
    target_ids = random.integers(0, 90, TOKENS).astype(np.int32)
    shard = OpenShard(target_ids, offsets, sources, winners)
    settings = FuseSettings(tail=tail)
    rows = np.array([3, 0, 1])
    found = shard.read_rows(rows, settings)
    at = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows])
    widest = max(each.top_ids.shape[1] for each in sources)
    whole = [_widen(source.read(at), widest) for source in sources]
    expected = fuse_row(whole, settings)
    spoken = expected.has_signal
    np.testing.assert_array_equal(found.token_ids, target_ids[at])
    np.testing.assert_array_equal(found.fused.has_signal, spoken)
    np.testing.assert_array_equal(found.fused.winners, expected.winners)
    np.testing.assert_array_equal(found.fused.top_ids[spoken], expected.top_ids[spoken])
    for name in ("top_probs", "tail_probs"):
        ours, theirs = getattr(found.fused, name)[spoken], getattr(expected, name)[spoken]
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)
