"""The shards that a stage has still to write, as blocks of a Ray Data stream."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pyarrow as pa

from rayfuse.storage.dataset import DataSet

MAX_BLOCKS = 4096
"""Blocks of shard numbers in a Ray Data stream: the driver holds one object per block."""


def list_missing(data: DataSet, num_shards: int, note: Callable[[str], None]) -> list[int]:
    """List the shards that are still to be written, including those that are stale or lost.

    Args:
        data: The data set.
        num_shards: How many it has once it is complete.
        note: Called with a message if shards that were written are written again.
    """
    dropped = data.drop_missing_shards(num_shards)
    if dropped:
        note(
            f"{len(dropped)} shards, the first is {dropped[0]}, have lost their file or were made "
            "from other rows than there are now: they are written again"
        )
    committed = data.list_committed(num_shards)
    return [shard for shard in range(num_shards) if shard not in committed]


def split_shards(shards: Sequence[int], max_blocks: int = MAX_BLOCKS) -> list[pa.Table]:
    """Split shard numbers into tables of one column `shard`, the blocks of a Ray Data stream.

    Args:
        shards: The shard numbers.
        max_blocks: Blocks at most; fewer where there are fewer shards.
    """
    numbers = pa.table({"shard": pa.array(shards, pa.int64())})
    num_blocks = min(len(shards), max_blocks)
    cuts = [len(shards) * block // num_blocks for block in range(num_blocks + 1)]
    return [numbers.slice(a, b - a) for a, b in pairwise(cuts)]
