"""The weight files of a model folder: safetensors alone, all of them there, no adapter beside them.

`transformers` would read other formats, load an adapter into the model, or skip it silently where
peft is missing. A model is exactly its files here, so such folders are refused; an adapter has a
folder and a setting of its own (`rayfuse.models.adapter`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from rayfuse.config.base import UserError, first_line, user_error_from
from rayfuse.models.folder import read_json_object

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
"""Weights in formats that may hold code, or that torch does not read."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it."""

    shape: tuple[int, ...]
    dtype: str
    """By safetensors' name, such as `BF16`."""


def check_no_adapter(names: Iterable[str], model: str) -> None:
    """Check that no PEFT adapter is among a model's files.

    Args:
        names: The files' names.
        model: The model's name in errors.

    Raises:
        UserError: There is one.
    """
    if ADAPTER in names:
        raise UserError(
            f"model is {model!r}, a folder with a PEFT adapter ({ADAPTER}); name its base as "
            "`model` and the adapter as `adapter`, in a folder of its own, or remove its files"
        )


def list_weight_files(folder: Path) -> list[Path]:
    """List the files that a model folder is loaded from: one, or the shards that its index names.

    Raises:
        UserError: There is an adapter, there are no safetensors, or a shard is missing.
    """
    present = {path.name for path in folder.iterdir()}
    check_no_adapter(present, str(folder))
    if WEIGHTS in present:
        return [folder / WEIGHTS]
    if INDEX not in present:
        raise UserError(f"model is {str(folder)!r}, {_describe_missing(folder)}")
    shards = _read_shard_names(folder / INDEX)
    missing = sorted(shards - present)
    if missing:
        raise UserError(
            f"model is {str(folder)!r}, whose {INDEX} names {len(shards)} files; "
            f"{len(missing)} are missing, the first is {missing[0]!r}; download it again"
        )
    return [folder / name for name in sorted(shards)]


def _describe_missing(folder: Path) -> str:
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    if gguf:
        return (
            f"whose weights are GGUF ({gguf[0]}), which rayfuse does not read; convert them: "
            f"AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file={gguf[0]!r}) of transformers, "
            "then save_pretrained"
        )
    pickles = list_pickles(folder)
    if pickles:
        return (
            f"whose weights are not safetensors ({pickles[0]}); such files may run code when they "
            "are read: convert them (load the model, then save_pretrained), or use another revision"
        )
    return (
        f"a folder without config.json and *.safetensors ({WEIGHTS}, or {INDEX} and its files); "
        "save the model there with save_pretrained"
    )


def list_pickles(folder: Path) -> list[str]:
    """List the names of a folder's files in formats that may hold code."""
    return sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))


def _read_shard_names(index: Path) -> set[str]:
    places = read_json_object(index).get("weight_map")
    names = set(places.values()) if isinstance(places, dict) else set[str]()
    if not names or not all(_is_plain_name(name) for name in names):
        raise UserError(
            f"{index} is corrupt: its weight_map must give each tensor a file of this folder; "
            "download it again"
        )
    return names


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Read names, shapes and dtypes of all tensors in safetensors files, not the tensors.

    Raises:
        UserError: A file is incomplete or no safetensors, or two files hold the same tensor.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _read_header(file):
            if name in found:
                raise UserError(
                    f"{file} holds the tensor {name!r}, as another file does; remove it"
                )
            found[name] = tensor
    return found


def _read_header(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    with (
        user_error_from(
            lambda error: UserError(
                f"{file} is incomplete or no safetensors ({first_line(error)}); download it again"
            )
        ),
        safe_open(file, framework="np") as opened,
    ):
        for name in opened.keys():  # noqa: SIM118 (it is no dict)
            part = opened.get_slice(name)
            yield name, StoredTensor(tuple(part.get_shape()), part.get_dtype())
