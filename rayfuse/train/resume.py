"""Resuming a run from its newest checkpoint that is complete and not corrupt."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayfuse.config.base import UserError
from rayfuse.train.checkpoint import CheckpointRecord, Checkpoints
from rayfuse.train.pickle_guard import check_pickle
from rayfuse.train.process_group import ProcessGroup

TAG = "ds"
"""The folder of DeepSpeed's files within a checkpoint."""

UNIVERSAL = "universal"


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint on the local disk of a node."""

    folder: Path
    record: CheckpointRecord

    @property
    def is_universal(self) -> bool:
        """Whether it was converted to DeepSpeed's universal format."""
        return (self.folder / UNIVERSAL).is_dir()

    def load(self, engine: Any) -> None:
        """Load it into the engine; all workers must call."""
        decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
        tag = UNIVERSAL if self.is_universal else TAG
        loaded, _ = engine.load_checkpoint(str(self.folder), tag=tag)
        assert loaded, "DeepSpeed has not loaded a complete checkpoint"
        if self.is_universal:
            # DeepSpeed 0.19.8 with ZeRO-3 gives every parameter group the settings of the first
            # one, and lets the states of all groups share one step counter, which the optimizer
            # would then increment once per group.
            for group, decay in zip(engine.optimizer.param_groups, decays, strict=True):
                group["weight_decay"] = decay
            for state in engine.optimizer.optimizer.state.values():
                state["step"] = state["step"].clone()

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the metrics of each step up to it."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@contextlib.contextmanager
def fetch_newest(
    checkpoints: Checkpoints,
    group: ProcessGroup,
    log: Callable[[str], None],
    *,
    step: int | None = None,
) -> Iterator[LocalCheckpoint | None]:
    """Download the newest usable checkpoint, once per node, and delete the copy in the end.

    Args:
        checkpoints: The run's.
        group: All of its workers must call.
        log: Called with messages for the user.
        step: Only checkpoints of this step.

    Yields:
        The checkpoint; None if there is none that can be used.
    """
    # Rank 0 lists, and all use its list: listings of two workers may differ.
    complete = checkpoints.list_complete() if group.is_rank_zero else {}
    incomplete = checkpoints.list_incomplete() if group.is_rank_zero else []
    for records in reversed(group.broadcast(list(complete.values()))):
        first: CheckpointRecord = records[0]
        if step not in (None, first.step):
            continue
        found = LocalCheckpoint(group.scratch / first.name, first)
        fault = _fetch(checkpoints, records, found.folder) if group.is_local_rank_zero else ""
        faults = [fault for fault in group.gather(fault) if fault]
        if faults:
            log(f"the checkpoint of step {first.step} is not used: {faults[0]}")
            group.remove_folder(found.folder)
            continue
        is_resized = first.num_workers != group.num_workers
        if is_resized and group.is_local_rank_zero and has_parts(found.folder):
            convert_checkpoint(found.folder)
        group.barrier()
        is_last = not any(name > first.name for name in incomplete)
        workers = f" (of {first.num_workers} workers)" if is_resized else ""
        lost = "" if is_last else "; a later checkpoint is incomplete"
        if step is None:
            log(f"resuming from the checkpoint of step {first.step}{workers}{lost}")
        else:
            log(f"publishing the checkpoint of step {first.step}{workers}")
        yield found
        group.remove_folder(found.folder)
        return
    yield None


def _fetch(checkpoints: Checkpoints, records: list[CheckpointRecord], folder: Path) -> str:
    """Download a checkpoint and check it before it is loaded; return its fault, or nothing."""
    if not checkpoints.download(records, folder):
        return "it is corrupt"
    try:
        for path in sorted((folder / TAG).iterdir()):
            check_pickle(path)
    except UserError as error:
        return str(error)
    return ""


def has_parts(folder: Path) -> bool:
    """Check whether each worker has written its part of the optimizer, as all but ZeRO-0 do."""
    return any((folder / TAG).glob("*zero_pp_rank_*_optim_states.pt"))


def convert_checkpoint(folder: Path) -> None:
    """Convert a checkpoint to DeepSpeed's universal format, which any number of workers can load.

    Args:
        folder: The checkpoint; the result is put beside its files.
    """
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(folder / TAG), "--output_folder", str(folder / UNIVERSAL)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"cannot convert the checkpoint {folder.name} to another number of workers: set "
            "train.num_workers as it was, or delete the checkpoint; ds_to_universal reports "
            f"{done.stderr[-2000:]}"
        )
