"""A random corpus and aligned sources as data sets on a local disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from rayfuse.config.fuse import FuseSettings
from rayfuse.fuse.reader import ShardReader
from rayfuse.schema import ALIGNED, CORPUS
from rayfuse.storage.codec import encode_probs
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.store import LocalStore

VOCAB, ENTRIES = 61, 3


def write_data(
    folder: Path,
    lengths: Sequence[Sequence[int]],
    sources: Sequence[str] = ("a", "b"),
    stats: Mapping[str, dict[str, float]] | None = None,
) -> tuple[DataSet, dict[str, DataSet]]:
    """Write rows of so many tokens in each shard, and return the corpus and the sources by name."""
    store = LocalStore(str(folder))
    random = np.random.default_rng(0)
    names = ("corpus", *sources)
    data = {name: DataSet(store, name, "", name) for name in names}
    for name in names:
        data[name].claim({})
        for shard, each in enumerate(lengths):
            make = _make_corpus if name == "corpus" else _make_aligned
            data[name].write_shard(
                shard, make(shard, each, random), tokens=sum(each), stats=(stats or {}).get(name)
            )
        data[name].finish(len(lengths))
    return data.pop("corpus"), data


def open_reader(
    corpus: DataSet, aligned: dict[str, DataSet], fuse: FuseSettings | None = None
) -> ShardReader:
    return ShardReader(corpus, aligned, fuse or FuseSettings(), np.full(VOCAB, 2))


def _make_corpus(shard: int, lengths: Sequence[int], random: np.random.Generator) -> pa.Table:
    names = [f"d{shard}-{row}" for row in range(len(lengths))]
    columns = {
        "row_id": [f"{name}#0" for name in names],
        "doc_id": names,
        "domain": [""] * len(names),
        "text": ["x" * 2 * length for length in lengths],
        "num_bytes": [2 * length for length in lengths],
        "ends_document": [True] * len(names),
        "target_ids": [random.integers(0, VOCAB, length).tolist() for length in lengths],
    }
    return pa.Table.from_pydict(columns, schema=CORPUS)


def _make_aligned(shard: int, lengths: Sequence[int], random: np.random.Generator) -> pa.Table:
    def heads(length: int) -> tuple[list[int], list[int], list[float]]:
        ids = [random.permutation(VOCAB)[:ENTRIES] for _ in range(length)]
        probs = -np.sort(-random.dirichlet(np.ones(ENTRIES + 1), length), axis=1)
        codes = encode_probs(probs[:, :ENTRIES]).tolist()
        return np.concatenate(ids).tolist(), codes, np.log(probs[:, ENTRIES]).tolist()

    heads_of_rows = [heads(length) for length in lengths]
    columns = {
        "row_id": [f"d{shard}-{row}#0" for row in range(len(lengths))],
        "has_signal": [(random.random(length) < 0.7).tolist() for length in lengths],
        "top_ids": [ids for ids, _, _ in heads_of_rows],
        "top_logprobs": [codes for _, codes, _ in heads_of_rows],
        "tail_logprobs": [tails for _, _, tails in heads_of_rows],
        "nats_per_byte": [random.random(length).tolist() for length in lengths],
        "nats": [2.0 * length * random.random() for length in lengths],
        "num_tokens": list(lengths),
    }
    return pa.Table.from_pydict(columns, schema=ALIGNED)
