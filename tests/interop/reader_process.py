"""One of several processes that read a run with two workers each, stop, and resume.

`torchrun` starts it: `python -m torch.distributed.run ... -m tests.interop.reader_process FOLDER`.
It writes which worker read which rows: before the stop, and after it.
"""

import json
import os
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, get_worker_info

import rayfuse

NUM_WORKERS, NUM_BATCHES, EPOCH, SEED = 2, 3, 1, 4

Batch = tuple[int, list[str], dict[str, Any]]
"""The worker that read it, the ids of its rows, and the state of the data set after them."""


def name_with_state(rows: list[dict[str, Any]]) -> Batch:
    """Collate rows to a `Batch`."""
    worker = get_worker_info()
    return worker.id, [row["row_id"] for row in rows], worker.dataset.state_dict()


def load(
    storage: Path, rank: int, num_processes: int, states: dict[int, Any] | None = None
) -> DataLoader[Batch]:
    """Load the part of one process, from the start or from the states of its workers."""
    stream = rayfuse.open_dataset(storage).to_huggingface(seed=SEED)
    part = split_dataset_by_node(stream, rank, num_processes)
    part.set_epoch(EPOCH)

    def resume(worker: int) -> None:
        if states is not None and worker in states:
            get_worker_info().dataset.load_state_dict(states[worker])

    return DataLoader(
        part,
        batch_size=2,
        num_workers=NUM_WORKERS,
        collate_fn=name_with_state,
        worker_init_fn=resume,
    )


def main(folder: Path, rank: int, num_processes: int) -> None:
    """Read some batches, drop the loader, and read the rest from what was saved."""
    before, states = [], {}
    everything = load(folder / "storage", rank, num_processes)
    for worker, names, state in islice(everything, NUM_BATCHES):
        before.append((worker, names))
        states[str(worker)] = state
    saved = json.dumps(states)
    restored = {int(worker): state for worker, state in json.loads(saved).items()}
    after = [batch[:2] for batch in load(folder / "storage", rank, num_processes, restored)]
    (folder / f"read-{rank}.json").write_text(json.dumps({"before": before, "after": after}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
