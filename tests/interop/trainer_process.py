"""One of several processes that train as the page on other trainers does.

`torchrun` starts it: `python -m torch.distributed.run ... -m tests.interop.trainer_process FOLDER`.
It writes the losses of each trainer, and the rows of each batch that this process was given.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rayfuse
from tests.interop.other_trainers import INSTALLED, run_page

ROWS = 2
"""Rows of a batch of one process."""

LOSSES = {"trainer_losses", "lightning_losses", "sft_losses"}
"""Where the page keeps the losses of the trainers that train in several processes."""


def main(folder: Path, rank: int) -> None:
    """Run the page with every trainer that is installed, and write what this process saw."""
    collate = rayfuse.collate
    batches: list[list[str]] = []

    def record(rows: Sequence[dict[str, Any]]) -> Any:
        batches.append([row["row_id"] for row in rows])
        return collate(rows)

    rayfuse.collate = record
    own_folder = folder / f"process-{rank}"
    own_folder.mkdir()
    for name in ("storage", "target"):
        (own_folder / name).symlink_to(folder / name)
    changes = {"STEPS, ROWS, RATE = 4, 4, 1e-3": f"STEPS, ROWS, RATE = 4, {ROWS}, 1e-3"}
    if "lightning" in INSTALLED:
        changes["max_steps=STEPS,"] = 'max_steps=STEPS, devices=2, strategy="ddp",'
    seen: dict[str, Any] = {}
    for names in run_page(own_folder, INSTALLED, changes):
        for losses in names.keys() & LOSSES - seen.keys():
            seen[losses] = {"losses": names[losses], "batches": batches[: names["STEPS"]]}
        batches.clear()
    (folder / f"process-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["RANK"]))
