"""The devices a model is loaded to: one, or all GPUs of an actor by a device map of accelerate.

With a device map each GPU holds some of the layers and hands its hidden states to the next one.
Hooks of accelerate move them; a module's inputs may lie on any device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rayfuse.config.base import UserError
from rayfuse.config.models import ModelSettings, SourceSettings

GIB = 2**30


@dataclass(frozen=True)
class Placement:
    """Where the weights of a model are loaded to."""

    device_map: str | dict[str, Any] | None = None
    """As transformers takes it: a device by module, or a rule; None for the CPU."""
    max_memory: dict[int, int] | None = None
    """Bytes by GPU that a rule may use."""

    def check_fits(self, model: Any, name: str) -> None:
        """Check that a rule has put all weights on GPUs: a model on a disk would be far too slow.

        Args:
            model: The loaded model.
            name: Its name in errors.

        Raises:
            UserError: Some weights are on the CPU or on the disk.
        """
        devices = set(getattr(model, "hf_device_map", {}).values())
        if self.max_memory is None or devices <= self.max_memory.keys():
            return
        free = ", ".join(f"{size / GIB:.1f}" for size in self.max_memory.values())
        raise UserError(
            f"model is {name!r}, which does not fit the {len(self.max_memory)} GPUs of its actor "
            f"({free} GiB are free); raise sources[].gpus, or give it larger GPUs"
        )


def place_model(settings: ModelSettings, device: str) -> Placement:
    """Choose the devices of a model: a source with several GPUs is spread over them evenly.

    Weights go from their files to a GPU tensor by tensor: the host needs no memory for all of them.

    Args:
        settings: The model.
        device: The torch device of a model on one device: `cpu`, or `cuda`.
    """
    if device == "cpu":
        return Placement()
    gpus = int(settings.gpus or 1) if isinstance(settings, SourceSettings) else 1
    gpus = min(gpus, torch.cuda.device_count())  # outside of an actor there may be fewer
    if gpus <= 1:
        return Placement({"": device})
    return Placement("balanced", {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in range(gpus)})


def find_device(module: nn.Module) -> torch.device:
    """Find the device that a module computes on; weights that are read from a disk have none."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    weight: Any = module.weight
    return weight.device if device is None else torch.device(device)


def only_moves_inputs(module: nn.Module) -> bool:
    """Check that a module's hook, if it has one, moves inputs to it and loads no weights."""
    hook = getattr(module, "_hf_hook", None)
    return hook is None or not getattr(hook, "offload", True)
