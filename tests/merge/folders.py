"""A tiny target, and models as if they were trained from it: folders of real models."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.fakes import byte_level_tokenizer, save_model, save_tokenizer


def make_pivot(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """Write a tiny Llama with a tokenizer."""
    save_model("llama", 260, folder, tied=tied)
    save_tokenizer(byte_level_tokenizer(257), folder, bos=None, eos="<|end|>")
    path = folder / "model.safetensors"
    write(path, {name: tensor.to(dtype) for name, tensor in load_file(path).items()})
    return folder


def make_model(pivot: Path, folder: Path, seed: int, *, step: float = 0.05) -> Path:
    """Write a copy of a target whose weights have changed."""
    folder.mkdir()
    for file in pivot.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(seed)
    path = folder / "model.safetensors"
    weights = load_file(path)
    changed = {
        name: tensor + (step * torch.randn(tensor.shape)).to(tensor.dtype)
        for name, tensor in weights.items()
    }
    write(path, changed)
    return folder


def write(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write a file of weights as transformers does."""
    save_file(weights, path, metadata={"format": "pt"})
