"""Merge the folders of models tensor by tensor: at any time, one tensor of each is in memory."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rayfuse.config.base import UserError
from rayfuse.config.merge import MergeSettings
from rayfuse.merge.methods import TensorSettings, load_method
from rayfuse.merge.tensor_files import FLOATS, TensorPlace, find_tensors, rewrite_file
from rayfuse.models.folder import PLAIN_FILES, copy_files
from rayfuse.models.weight_files import list_weight_files

TOKENIZER = "tokenizer.json"

Places = dict[str, TensorPlace]
"""A model's tensors by name."""

SAVE_REMEDY = (
    "load the target by AutoModelForCausalLM.from_pretrained of transformers, write it by "
    "save_pretrained, and fuse from that folder"
)


@dataclass(frozen=True)
class StoredTensors(Sequence[torch.Tensor]):
    """One tensor of several models; each access reads it from disk."""

    places: tuple[TensorPlace, ...]
    dtype: torch.dtype
    """Of the tensors that are returned."""

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int | slice) -> "torch.Tensor | StoredTensors":  # pyright: ignore[reportIncompatibleMethodOverride]
        if isinstance(index, slice):
            return StoredTensors(self.places[index], self.dtype)
        return self.places[index].read().to(self.dtype)


def merge_folders(
    models: Mapping[str, Path],
    pivot: Path,
    merged: Path,
    *,
    method: str,
    settings: MergeSettings,
) -> None:
    """Write the merge of several models that were trained from the same pivot.

    Tensors that are not floating-point are those of the first model.

    Args:
        models: The folders of the models, by the source that each was fused with. The result has
            the files, dtypes, config and tokenizer of the first.
        pivot: The folder of the target before fusion. It may hold more tensors than the models.
        merged: An empty folder.
        method: One of `config.merge.METHODS`.
        settings: The settings of the merges.

    Raises:
        UserError: The models differ in the names, shapes or dtypes of their tensors or in their
            tokenizers, the pivot lacks a tensor, all weights are 0, or a file is corrupt.
    """
    names, folders = [*models], [*models.values()]
    settings.list_weights(names)
    files = list_weight_files(folders[0])
    tensors = [find_tensors(list_weight_files(folder)) for folder in folders]
    base = find_tensors(list_weight_files(pivot))
    for folder, own in zip(folders[1:], tensors[1:], strict=True):
        _check_alike(tensors[0], own, folders[0], folder)
    _check_pivot(tensors[0], base, pivot)
    _check_tokenizers(folders)
    function = load_method(method)

    def merge_tensor(place: TensorPlace) -> torch.Tensor | bytearray:
        dtype = FLOATS.get(place.dtype)
        if dtype is None:
            return place.read_bytes()
        wide = torch.promote_types(dtype, torch.float32)
        # The pivot in the dtype that training began with: rounding is no change.
        origin = base[place.name].read().to(dtype).to(wide)
        stored = StoredTensors(tuple(own[place.name] for own in tensors), wide)
        return function(origin, stored, _describe_tensor(settings, names, place.name)).to(dtype)

    copy_files(folders[0], merged, PLAIN_FILES)
    for file in files:
        rewrite_file(file, merged / file.name, merge_tensor)


def _describe_tensor(settings: MergeSettings, names: Sequence[str], tensor: str) -> TensorSettings:
    """Choose the settings of one tensor: its seeds do not depend on the order of the tensors."""
    seeds = [f"{settings.seed}\n{name}\n{tensor}".encode() for name in names]
    return TensorSettings(
        weights=tuple(settings.list_weights(names)),
        seeds=tuple(int.from_bytes(hashlib.sha256(seed).digest()[:7], "big") for seed in seeds),
        t=settings.t,
        scale=settings.scale,
        density=settings.density,
        tau=settings.tau,
    )


def _check_alike(first: Places, second: Places, first_folder: Path, folder: Path) -> None:
    what = f"{folder} and {first_folder} cannot be merged"
    if differing := sorted(first.keys() ^ second.keys()):
        raise UserError(
            f"{what}: {differing[0]!r} is in one of them only ({len(differing)} such tensors); "
            "merge models that were trained from one target"
        )
    for name, place in first.items():
        own, other = (place.dtype, place.shape), (second[name].dtype, second[name].shape)
        if own != other:
            found = f"{second[name].dtype} {list(second[name].shape)}"
            raise UserError(
                f"{what}: {name!r} is {found}, not {place.dtype} {list(place.shape)}; merge models "
                "that were trained from one target"
            )


def _check_pivot(tensors: Places, pivot: Places, folder: Path) -> None:
    floats = {name: place for name, place in tensors.items() if place.dtype in FLOATS}
    missing = sorted(floats.keys() - pivot.keys())
    if missing:
        raise UserError(
            f"target {folder} lacks {missing[0]!r} ({len(missing)} such tensors), which the fused "
            f"models have, so that their changes are not known; {SAVE_REMEDY}"
        )
    for name, place in floats.items():
        found = pivot[name]
        if found.dtype not in FLOATS or found.shape != place.shape:
            raise UserError(
                f"target {folder}: {name!r} is {found.dtype} {list(found.shape)}, and "
                f"{place.dtype} {list(place.shape)} in the fused models; {SAVE_REMEDY}"
            )


def _check_tokenizers(folders: Sequence[Path]) -> None:
    first, *others = (folder / TOKENIZER for folder in folders)
    for folder, other in zip(folders[1:], others, strict=True):
        if other.read_bytes() != first.read_bytes():
            raise UserError(
                f"{folder} and {folders[0]} cannot be merged: their tokenizers differ; merge "
                "models that were trained from one target"
            )
