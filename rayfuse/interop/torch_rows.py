"""Rows by their number, as a PyTorch `Dataset`."""

from collections import OrderedDict
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from rayfuse.interop.views import OpenRows, RowReader

OPEN_SHARDS = 8
"""Shards that are kept in memory."""


class NumberedRows(Dataset[dict[str, Any]]):
    """Rows by their number, in the order in which they are stored."""

    def __init__(self, reader: RowReader) -> None:
        self.reader = reader
        self.ends = np.cumsum(reader.rows_per_shard)
        self.open: OrderedDict[int, OpenRows] = OrderedDict()

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        shard = int(np.searchsorted(self.ends, number, side="right"))
        start = self.ends[shard - 1] if shard else 0
        return next(self._open(shard).read(np.array([number - start])).iterate())

    def _open(self, shard: int) -> OpenRows:
        """Look up an open shard, or open it in place of the one that was used least recently."""
        if shard not in self.open:
            self.open[shard] = self.reader.open_shard(shard)
        self.open.move_to_end(shard)
        while len(self.open) > OPEN_SHARDS:
            self.open.popitem(last=False)
        return self.open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"open": OrderedDict[int, Any]()}  # each process opens its own
