"""Pickles from the storage are checked before DeepSpeed loads them: loading one runs its code."""

from pathlib import Path
from typing import Any

import torch

from rayfuse.config.base import UserError, first_line, user_error_from

DEEPSPEED_GLOBALS = (
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
)
"""What the checkpoints of this package hold besides tensors and plain values."""


class _Inert:
    """Stands for each of DeepSpeed's classes while a pickle is checked."""

    def __init__(self, *values: Any) -> None:
        self.values = values


def check_pickle(path: Path) -> None:
    """Check that a checkpoint file holds tensors, plain values and `DEEPSPEED_GLOBALS` alone.

    torch's restricted unpickler executes the file as far as it may. It calls no other global, and
    refuses opcodes that could find one; pickles in the format before zip files are refused as well.
    Tensors are not read.

    Raises:
        UserError: The file would run other code, or is no checkpoint.
    """
    with user_error_from(  # a broken pickle fails in any of the functions that it may call
        lambda error: UserError(
            f"{path.name} is no checkpoint of this package and is not loaded: {first_line(error)}"
        )
    ):
        inert: list[Any] = [(_Inert, name) for name in DEEPSPEED_GLOBALS]
        with torch.serialization.safe_globals(inert):
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
            if unsafe:
                raise ValueError(f"it holds {', '.join(sorted(unsafe))}")
            torch.load(path, map_location="meta", mmap=True, weights_only=True)
