"""The rules on stored shards against the oracle on decoded rows."""

import numpy as np
import pyarrow as pa
import pytest

from rayfuse.config.fuse import FuseSettings
from rayfuse.fuse.reader import OpenShard, _open_source
from rayfuse.fuse.rules import OpenSource, select_lowest
from rayfuse.schema import ALIGNED
from rayfuse.storage.codec import EncodedTopK, TopK, decode_probs, encode_probs
from tests.fuse.oracle import AlignedSource, fuse_sources

TOKENS, LENGTHS = 60, (7, 20, 1, 32)


def open_source(random: np.random.Generator, entries: int, weight: float = 1.0) -> OpenSource:
    outcomes = -np.sort(-random.dirichlet(np.ones(entries + 1), size=TOKENS), axis=1)
    ids = np.stack([random.permutation(90)[:entries] for _ in range(TOKENS)]).astype(np.int32)
    ids[random.random(ids.shape) < 0.2] = -1
    has_signal = (random.random(TOKENS) < 0.7) & (ids >= 0).any(axis=1)
    codes = encode_probs(outcomes[:, :-1]).reshape(ids.shape)
    tail_logprobs = np.log(outcomes[:, -1]).astype(np.float16)
    nll = np.where(has_signal, random.random(TOKENS), np.inf)
    return OpenSource(EncodedTopK(ids, codes, tail_logprobs), nll, weight)


def decode_source(source: OpenSource, at: np.ndarray, entries: int) -> AlignedSource:
    """Decode a source at some positions, with empty entries up to `entries`."""
    ids, tails = source.top.ids[at], source.top.tail_logprobs[at].astype(np.float32)
    probs = decode_probs(source.top.codes[at].reshape(-1), ids, tails)
    room = ((0, 0), (0, entries - ids.shape[1]))
    top = TopK(np.pad(ids, room, constant_values=-1), np.pad(probs, room), np.exp(tails))
    return AlignedSource(np.isfinite(source.nll[at]), top, source.nll[at], source.weight)


def to_dense(top: TopK) -> np.ndarray:
    """Return the probability of every token at every position."""
    dense = np.zeros((len(top.ids), 91))
    np.add.at(dense, (np.arange(len(top.ids))[:, None], top.ids), top.probs)
    return dense[:, :-1]  # the last column is -1, no entry


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("method", ["min_ce", "avg_ce"])
@pytest.mark.parametrize("seed", range(5))
def test_a_rule_on_stored_shards_equals_the_oracle_on_decoded_rows(seed, method, tail):
    random = np.random.default_rng(seed)
    sources = tuple(open_source(random, entries) for entries in (4, 6, 1))
    offsets = np.cumsum([0, *LENGTHS])
    selected = select_lowest(np.stack([source.nll for source in sources])).astype(np.int16)
    target_ids = random.integers(0, 90, TOKENS).astype(np.int32)
    settings = FuseSettings(method=method, tail=tail)
    rows = np.array([3, 0, 1])
    found = OpenShard(target_ids, offsets, sources, selected).read_rows(rows, settings)
    at = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows])
    widest = max(source.top.ids.shape[1] for source in sources)
    expected = fuse_sources([decode_source(source, at, widest) for source in sources], settings)
    has_signal = expected.has_signal
    np.testing.assert_array_equal(found.token_ids, target_ids[at])
    np.testing.assert_array_equal(found.has_signal, has_signal)
    np.testing.assert_array_equal(found.selected, expected.selected)
    if method == "min_ce":
        np.testing.assert_array_equal(found.top.ids[has_signal], expected.top.ids[has_signal])
    np.testing.assert_allclose(
        to_dense(found.top)[has_signal], to_dense(expected.top)[has_signal], rtol=1e-6, atol=1e-9
    )
    np.testing.assert_allclose(
        found.top.tail[has_signal], expected.top.tail[has_signal], rtol=1e-6, atol=1e-9
    )
    mass = found.top.probs.sum(axis=1) + found.top.tail
    np.testing.assert_allclose(mass, has_signal.astype(float), atol=1e-6)


def test_a_position_without_entries_has_no_signal_when_renormalised():
    """float16 rounds the log of a tail of 0.99999994 to just below 0."""
    columns = {
        "has_signal": [[True, True]],
        "top_ids": [[-1, 3]],
        "top_logprobs": [[0, 0]],
        "tail_logprobs": pa.array([np.array([-6e-8, -1.0], dtype=np.float16)]),
    }
    table = pa.table(columns, schema=pa.schema([ALIGNED.field(name) for name in columns]))
    source = _open_source(table, np.full(2, 0.5), weight=1.0, fuse=FuseSettings(tail="renormalise"))
    assert source.nll.tolist() == [np.inf, 0.5]
