"""Rows as a Hugging Face `IterableDataset`, whose order is a function of seed and epoch."""

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
from datasets.iterable_dataset import ExamplesIterable

from rayfuse.interop.views import RowReader, read_rows


def stream_rows(reader: RowReader, seed: int | None) -> datasets.IterableDataset:
    """Stream rows; the shards are the library's unit of work of nodes and workers.

    Args:
        reader: Opens the shards.
        seed: Of their order; None for the order in which they are stored.
    """
    shards = list(range(len(reader.rows_per_shard)))
    order = None if seed is None else (seed,)
    given = {"reader": reader, "order": order, "shards": _shuffle(shards, order)}
    return datasets.IterableDataset(ShardExamples(_read_shards, given))


class ShardExamples(ExamplesIterable):
    """Shards of rows. The library's own shuffle would keep the order of the rows within each."""

    def shuffle_data_sources(self, generator: np.random.Generator) -> "ShardExamples":
        """Shuffle for an epoch, from the library's generator of it."""
        if self.kwargs["order"] is None:
            return self
        order = (*self.kwargs["order"], int(generator.integers(2**63)))
        shards = _shuffle(sorted(self.kwargs["shards"]), order)
        return ShardExamples(_read_shards, self.kwargs | {"order": order, "shards": shards})

    def shard_data_sources(
        self, num_shards: int, index: int, contiguous: bool = True
    ) -> "ShardExamples":
        """Keep one node's or worker's shards."""
        part = self.split_shard_indices_by_worker(num_shards, index, contiguous=contiguous)
        shards = [self.kwargs["shards"][number] for number in part]
        return ShardExamples(_read_shards, self.kwargs | {"shards": shards})


def _shuffle(shards: list[int], order: tuple[int, ...] | None) -> list[int]:
    if order is None:
        return shards
    return [shards[at] for at in np.random.default_rng(order).permutation(len(shards))]


def _read_shards(
    reader: RowReader, order: tuple[int, ...] | None, shards: list[int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of shards, each with a key. The library calls it with one shard at a time."""
    for shard in shards:
        numbers = np.arange(reader.rows_per_shard[shard])
        if order is not None:
            numbers = np.random.default_rng((*order, shard)).permutation(numbers)
        for number, row in zip(numbers, read_rows(reader, shard, numbers), strict=True):
            yield f"{shard}-{number}", row
