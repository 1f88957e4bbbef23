"""Bound the host memory of a process that holds a model and scores rows with it.

Ray reserves what a process requests, and places no more of them on a node than fit. Every term is
an upper bound or was measured (LOG.md); on a GPU, weights and logits are not in the host's memory.
"""

import math
from pathlib import Path

from rayfuse.config.models import ModelSettings, TrainedSettings
from rayfuse.models.config_file import find_text_part
from rayfuse.models.files import ModelFiles, import_architecture, read_model_files
from rayfuse.models.weight_files import list_weight_files, read_headers

GIB = 2**30

PROCESS_BYTES = 3 * GIB // 4
"""Of a process that has imported ray, torch and transformers, and of a small model's tokenizer."""

CUDA_BYTES = 3 * GIB
"""The same with CUDA's libraries. Not measured: assumed."""

TOKEN_BYTES = 1200
"""Of a tokenizer, for each of its tokens."""

UNIT_BYTES = 64
"""Of the activations of one layer on a CPU, for each token and unit of width."""

WEIGHT_BYTES = {"auto": 4, "float32": 4}
"""Of a weight on a CPU, by `dtype`; others have 2, which bounds quantised ones."""

LOGIT_BYTES = 4

MERGED_TENSORS = 8
"""Tensors in memory besides one of each model, by the merge method that needs most (LOG.md)."""

WIDTH_KEYS = ("hidden_size", "n_embd", "d_model")
"""Keys of config.json for the width, in different families."""

DEFAULT_WIDTH = 8192
"""Assumed where config.json has no width under a known key."""


def estimate_host_memory(
    settings: ModelSettings,
    *,
    batch_tokens: int,
    chunk_positions: int,
    on_gpu: bool,
    kept_bytes: int = 0,
) -> int:
    """Estimate the host memory of a process that scores rows with a model, in bytes.

    Args:
        settings: The model.
        batch_tokens: Tokens of a forward pass.
        chunk_positions: Positions with logits in memory at a time.
        on_gpu: The weights are on GPUs.
        kept_bytes: Of the records that the process holds besides.

    Raises:
        UserError: The model's files cannot be read.
    """
    if isinstance(settings, TrainedSettings):
        settings = settings.target
    files = read_model_files(settings)
    tokenizer = files.head_width * TOKEN_BYTES
    if on_gpu:
        return math.ceil(CUDA_BYTES + tokenizer + kept_bytes)
    weights = count_weights(settings) * WEIGHT_BYTES.get(settings.dtype, 2)
    logits = min(chunk_positions, batch_tokens) * files.head_width * LOGIT_BYTES
    activations = batch_tokens * _find_width(files) * UNIT_BYTES
    return math.ceil(PROCESS_BYTES + tokenizer + weights + logits + activations + kept_bytes)


def _find_width(files: ModelFiles) -> int:
    text = files.config | find_text_part(files.config)
    widths = (text[key] for key in WIDTH_KEYS if isinstance(text.get(key), int))
    return next(widths, DEFAULT_WIDTH)


def estimate_merge_memory(settings: ModelSettings, num_models: int) -> int:
    """Estimate the host memory of a process that merges models tensor by tensor, in bytes.

    Args:
        settings: The target that they were trained from.
        num_models: How many there are.

    Raises:
        UserError: The target's files cannot be read.
    """
    largest = 4 * _count_largest_tensor(settings)  # float32
    return math.ceil(PROCESS_BYTES + (num_models + MERGED_TENSORS) * largest)


def _count_largest_tensor(settings: ModelSettings) -> int:
    """Count the elements of a model's largest tensor; of a hub model, those of the embeddings."""
    folder = Path(settings.model).expanduser()
    if folder.is_dir():
        stored = read_headers(list_weight_files(folder)).values()
        return max(math.prod(tensor.shape) for tensor in stored)
    files = read_model_files(settings)
    return files.head_width * _find_width(files)


def count_weights(settings: ModelSettings) -> int:
    """Count a model's weights: in the headers of its files, or of its architecture on the hub.

    Raises:
        UserError: The files cannot be read.
    """
    folder = Path(settings.model).expanduser()
    if folder.is_dir():
        stored = read_headers(list_weight_files(folder)).values()
        return sum(math.prod(tensor.shape) for tensor in stored)
    return import_architecture().count_parameters(settings)
