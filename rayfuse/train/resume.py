"""A training goes on from its newest checkpoint that is whole and undamaged."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayfuse.train.checkpoint import Checkpoints, Record
from rayfuse.train.process_group import Peers

TAG = "ds"
"""The folder of DeepSpeed's files within a checkpoint."""

UNIVERSAL = "universal"


@dataclass(frozen=True)
class Found:
    """A checkpoint on this machine."""

    folder: Path
    record: Record

    @property
    def is_universal(self) -> bool:
        """Whether it was converted to DeepSpeed's universal format."""
        return (self.folder / UNIVERSAL).is_dir()

    def load(self, engine: Any) -> None:
        """Put it into the engine; all workers must call."""
        decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
        tag = UNIVERSAL if self.is_universal else TAG
        loaded, _ = engine.load_checkpoint(str(self.folder), tag=tag)
        assert loaded, "DeepSpeed has not loaded a checkpoint that is whole"
        if self.is_universal:
            # With ZeRO 3 all groups have got the first one's settings, and their states share one
            # count of steps, which each of them raises (DeepSpeed 0.19.8).
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
    checkpoints: Checkpoints, peers: Peers, tell: Callable[[str], None]
) -> Iterator[Found | None]:
    """Give the newest checkpoint that can be used, if there is one; each machine fetches it once.

    Args:
        checkpoints: The training's own.
        peers: All of them must call.
        tell: Called with what the user should know.
    """
    whole = checkpoints.list_complete() if peers.is_rank_zero else {}
    cut_off = checkpoints.list_incomplete() if peers.is_rank_zero else []
    for records in reversed(peers.broadcast(list(whole.values()))):
        first: Record = records[0]
        found = Found(peers.scratch / first.name, first)
        is_good = not peers.is_first_here or checkpoints.download(records, found.folder)
        if all(peers.gather(is_good)):
            is_other = first.num_workers != peers.num_workers
            if is_other and peers.is_first_here and has_parts(found.folder):
                convert_checkpoint(found.folder)
            peers.barrier()
            is_last = not any(name > first.name for name in cut_off)
            was = f" (of {first.num_workers} workers)" if is_other else ""
            lost = "" if is_last else "; a later checkpoint was cut off"
            tell(f"goes on from the checkpoint of step {first.step}{was}{lost}")
            yield found
            peers.remove(found.folder)
            return
        tell(f"the checkpoint of step {first.step} is damaged, so not used")
        peers.remove(found.folder)
    yield None


def has_parts(folder: Path) -> bool:
    """Return whether each worker has written its part of the optimiser: not so with ZeRO 0."""
    return any((folder / TAG).glob("*zero_pp_rank_*_optim_states.pt"))


def convert_checkpoint(folder: Path) -> None:
    """Make DeepSpeed's universal format of a checkpoint, beside it, for any number of workers."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(folder / TAG), "--output_folder", str(folder / UNIVERSAL)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the checkpoint cannot be converted: {done.stderr[-2000:]}")
