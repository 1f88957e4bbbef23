"""The workers of a training, and what they tell one another."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Peers:
    """Which of all workers this one is, and what its machine's workers share."""

    rank: int
    num_workers: int
    local_rank: int
    """Among the workers of its machine."""
    scratch: Path
    """A folder of the machine for local files."""

    @property
    def is_rank_zero(self) -> bool:
        """Whether it speaks for all workers."""
        return self.rank == 0

    @property
    def is_first_here(self) -> bool:
        """Whether it speaks for its machine's workers."""
        return self.local_rank == 0

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every worker."""
        held = [value]
        torch.distributed.broadcast_object_list(held)
        return held[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every worker's value."""
        values: list[Any] = [None] * self.num_workers
        torch.distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Return once every worker has called."""
        self.gather(None)

    def renew_scratch(self) -> None:
        """Make the machine's folder anew, without what workers that were killed have left."""
        if self.is_first_here:
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir(mode=0o700)
        self.barrier()

    def remove(self, folder: Path) -> None:
        """Delete a folder of the machine once no worker needs it."""
        self.barrier()
        if self.is_first_here:
            shutil.rmtree(folder, ignore_errors=True)
