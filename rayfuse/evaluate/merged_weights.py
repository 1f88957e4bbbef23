"""Weight merging as a baseline: the plain mean of models that have the same tensors."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rayfuse.config.base import UserError
from rayfuse.config.models import ModelSettings
from rayfuse.models.folder import PLAIN_FILES, copy_files, find_folder
from rayfuse.run.made_models import store_model
from rayfuse.runtime.scratch import scratch_folder
from rayfuse.storage.store import Store


def average_weights(folders: Sequence[Path], merged: Path) -> None:
    """Write a model in which every weight is the plain mean over the given models.

    One tensor of every model and one file of the result are in memory at a time.

    Args:
        folders: Model folders with safetensors. The result takes its files, dtypes, config and
            tokenizer from the first.
        merged: An empty folder.

    Raises:
        UserError: The models differ in the names or shapes of their tensors.
    """
    copy_files(folders[0], merged, PLAIN_FILES)
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
        raise UserError(
            f"the weights of {folder} and {first} cannot be averaged: {sorted(differing)[0]!r} is "
            f"in one of them only ({len(differing)} such tensors)"
        )


def _average(handles: Sequence[Any], name: str) -> torch.Tensor:
    """Average a tensor over the models; integer buffers, which have no mean, are the first's."""
    tensors: list[torch.Tensor] = [handle.get_tensor(name) for handle in handles]
    first = tensors[0]
    if any(tensor.shape != first.shape for tensor in tensors):
        shapes = [list(tensor.shape) for tensor in tensors]
        raise UserError(f"the weights {name!r} cannot be averaged: their shapes are {shapes}")
    if not first.is_floating_point():
        return first
    # In float64, so that the mean of equal bfloat16 weights is bit-identical to them.
    total = torch.zeros_like(first, dtype=torch.float64)
    for tensor in tensors:
        total += tensor
    return (total / len(tensors)).to(first.dtype)


def merge_models(models: list[ModelSettings], store: Store, folder: str) -> None:
    """Store the model of averaged weights below a folder, `done.json` last; a Ray task."""
    with scratch_folder("merged") as merged:
        average_weights([_find_weights(model) for model in models], merged)
        store_model(store, folder, merged, {})


def _find_weights(model: ModelSettings) -> Path:
    return find_folder(model.model, model.revision, ("*.safetensors", *PLAIN_FILES))
