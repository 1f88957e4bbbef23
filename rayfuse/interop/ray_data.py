"""Rows as a Ray Dataset."""

from functools import partial

import pyarrow as pa
import ray.data
from ray.data import Dataset

from rayfuse.interop.views import RowReader, read_table
from rayfuse.storage.todo import split_shards


def read_shards(reader: RowReader) -> Dataset:
    """Read each shard in a task of its own, so that no row passes through the driver."""
    numbers = ray.data.from_arrow(split_shards(range(len(reader.rows_per_shard))))
    return numbers.map_batches(
        partial(_read_batch, reader=reader), batch_size=1, batch_format="pyarrow"
    )


def _read_batch(batch: pa.Table, reader: RowReader) -> pa.Table:
    return pa.concat_tables([read_table(reader, shard) for shard in batch["shard"].to_pylist()])
