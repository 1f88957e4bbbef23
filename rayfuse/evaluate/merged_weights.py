"""Weight merging as a baseline: the plain mean of models that have the same tensors."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rayfuse.models.files import PLAIN_FILES


def average_weights(folders: Sequence[Path], merged: Path) -> None:
    """Write the model whose every weight is the mean of the models', each with the same share.

    One tensor of all models is in memory at a time, and one file of the result.

    Args:
        folders: Model folders with safetensors; the first gives the result its files, its data
            types, its config and its tokenizer.
        merged: An empty folder.

    Raises:
        ValueError: A model lacks a tensor, has one more or one of another shape.
    """
    for pattern in PLAIN_FILES:
        for file in folders[0].glob(pattern):
            shutil.copy(file, merged / file.name)
    with ExitStack() as stack:
        models = [
            {name: handle for handle in _open_files(folder, stack) for name in handle.offset_keys()}
            for folder in folders
        ]
        for folder, model in zip(folders, models, strict=True):
            _check_names(models[0].keys() ^ model.keys(), folder, folders[0])
        for file in sorted(folders[0].glob("*.safetensors")):
            with safe_open(file, framework="pt") as handle:
                names = handle.offset_keys()
            tensors = {name: _average([model[name] for model in models], name) for name in names}
            save_file(tensors, merged / file.name, metadata={"format": "pt"})


def _open_files(folder: Path, stack: ExitStack) -> Iterator[Any]:
    for file in sorted(folder.glob("*.safetensors")):
        yield stack.enter_context(safe_open(file, framework="pt"))


def _check_names(differing: set[str], folder: Path, first: Path) -> None:
    if differing:
        raise ValueError(
            f"the weights of {folder} and {first} cannot be averaged: {sorted(differing)[0]!r} is "
            f"in one of them only ({len(differing)} such tensors)"
        )


def _average(handles: Sequence[Any], name: str) -> torch.Tensor:
    """Return the mean of a tensor over the models; what is no number of a weight is the first's."""
    tensors: list[torch.Tensor] = [handle.get_tensor(name) for handle in handles]
    first = tensors[0]
    if any(tensor.shape != first.shape for tensor in tensors):
        shapes = [list(tensor.shape) for tensor in tensors]
        raise ValueError(f"the weights {name!r} cannot be averaged: their shapes are {shapes}")
    if not first.is_floating_point():
        return first
    total = torch.zeros_like(first, dtype=torch.float64)
    for tensor in tensors:
        total += tensor
    return (total / len(tensors)).to(first.dtype)
