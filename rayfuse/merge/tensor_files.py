"""Safetensors read and written one tensor at a time.

`safe_open` maps files into memory, where the pages of all tensors that were read stay; and
`save_file` takes all tensors of a file at once.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rayfuse.models.weight_files import read_headers

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""The dtypes of weights that can be merged, by the names of safetensors."""

LENGTH_BYTES = 8
"""Of the number that a file begins with: the length of its header."""


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor is stored."""

    file: Path
    name: str
    dtype: str
    """By safetensors' name, such as `BF16`."""
    shape: tuple[int, ...]
    start: int
    """Of its first byte, from the start of the file."""
    num_bytes: int

    def read_bytes(self) -> bytearray:
        """Read the tensor as it is stored.

        Raises:
            OSError: The file ends before it.
        """
        content = bytearray(self.num_bytes)
        with open(self.file, "rb", buffering=0) as opened:
            opened.seek(self.start)
            view = memoryview(content)
            while view:
                count = opened.readinto(view)
                if not count:
                    raise OSError(f"{self.file} ends within the tensor {self.name!r}")
                view = view[count:]
        return content

    def read(self) -> torch.Tensor:
        """Read a tensor of one of the `FLOATS`."""
        if not self.num_bytes:
            return torch.zeros(self.shape, dtype=FLOATS[self.dtype])
        return torch.frombuffer(self.read_bytes(), dtype=FLOATS[self.dtype]).view(self.shape)


def find_tensors(files: Iterable[Path]) -> dict[str, TensorPlace]:
    """Find all tensors of a model's files, by name.

    Raises:
        UserError: A file is incomplete or no safetensors, or two files hold the same tensor.
    """
    listed = list(files)
    read_headers(listed)  # checks them
    return {place.name: place for file in listed for place in _list_places(file)}


def _list_places(file: Path) -> Iterator[TensorPlace]:
    header = _read_header(file)
    for name, entry in json.loads(header[LENGTH_BYTES:]).items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            shape = tuple(entry["shape"])
            yield TensorPlace(file, name, entry["dtype"], shape, len(header) + start, stop - start)


def _read_header(file: Path) -> bytes:
    """Read the bytes of a file before its first tensor."""
    with open(file, "rb") as opened:
        length = opened.read(LENGTH_BYTES)
        return length + opened.read(int.from_bytes(length, "little"))


def rewrite_file(
    file: Path, written: Path, convert: Callable[[TensorPlace], torch.Tensor | bytearray]
) -> None:
    """Write a file with the header of another one, and with other values.

    Args:
        file: The file whose tensors' names, dtypes, shapes and order are taken over.
        written: The file to write.
        convert: Computes a tensor of the place's dtype and shape, or its bytes.
    """
    with open(written, "wb") as opened:
        opened.write(_read_header(file))
        for place in sorted(_list_places(file), key=lambda place: place.start):
            content: Any = convert(place)
            if isinstance(content, torch.Tensor):
                content = content.contiguous().flatten().view(torch.uint8).numpy()
            opened.write(memoryview(content))
            del content  # or two would be in memory
