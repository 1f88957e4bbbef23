"""The workers of one run: their ranks, their collectives, and each node's scratch folder."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rayfuse.runtime.scratch import claim_scratch


@dataclass(frozen=True)
class ProcessGroup:
    """One worker's view of all workers; `torch.distributed` must be initialised."""

    rank: int
    num_workers: int
    local_rank: int
    """The rank among the workers of the same node."""
    scratch: Path
    """A local folder that the workers of a node share."""

    @property
    def is_rank_zero(self) -> bool:
        """Whether this worker acts for all workers."""
        return self.rank == 0

    @property
    def is_local_rank_zero(self) -> bool:
        """Whether this worker acts for the workers of its node."""
        return self.local_rank == 0

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every worker; all must call."""
        values = [value]
        torch.distributed.broadcast_object_list(values)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all workers by rank, on every worker; all must call."""
        values: list[Any] = [None] * self.num_workers
        torch.distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every worker has called."""
        self.gather(None)

    def reset_scratch(self) -> None:
        """Create the node's scratch folder, without files of an earlier attempt; all must call.

        Workers that were killed could not remove theirs.
        """
        if self.is_local_rank_zero:
            claim_scratch(self.scratch)  # until this process ends
        self.barrier()

    def remove_folder(self, folder: Path) -> None:
        """Delete a folder of the node once no worker needs it; all must call."""
        self.barrier()
        if self.is_local_rank_zero:
            shutil.rmtree(folder, ignore_errors=True)
