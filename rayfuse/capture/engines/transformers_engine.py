"""A source LLM in Hugging Face transformers: one process, all GPUs of its actor or the CPU."""

import numpy as np
import torch
from jaxtyping import Bool

from rayfuse.capture.engines.base import Failure, TokenRows, score_in_windows
from rayfuse.capture.engines.memory import BatchScorer
from rayfuse.capture.sampling import make_noise
from rayfuse.capture.top_k import TopLogprobs, keep_top_k
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import ModelSettings
from rayfuse.models.batching import pad_rows
from rayfuse.models.causal_lm import CausalLM, load_causal_lm
from rayfuse.models.files import load_recipe_tokenizer, read_model_files


class TransformersEngine:
    """A Hugging Face model in this process, on its GPUs if it has any."""

    def __init__(self, source: ModelSettings, settings: CaptureSettings) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.lm = load_causal_lm(source, device)
        tokenizer = load_recipe_tokenizer(source)
        self.known_ids = np.zeros(self.lm.head.out_features, dtype=bool)
        self.known_ids[: tokenizer.vocab_size] = tokenizer.known_ids()
        files = read_model_files(source)
        self.context_tokens = files.context_tokens
        self.batches = score_with(self.lm, self.known_ids, settings, salt=files.identity)

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch at present: fewer than the recipe's after running out of memory."""
        return self.batches.batch_tokens

    def score_rows(self, rows: TokenRows) -> list[TopLogprobs | Failure]:
        """Score rows, and return one result per row in the same order.

        Rows beyond the context length are scored in windows.

        Raises:
            EngineMemoryError: The device has no memory for half of one row.
        """
        return score_in_windows(rows, self.context_tokens, self.batches.score_rows)


def score_with(
    lm: CausalLM, known_ids: Bool[np.ndarray, " vocab"], settings: CaptureSettings, *, salt: str
) -> BatchScorer:
    """Make an LLM in memory the scorer of rows within its context length.

    Args:
        lm: The LLM.
        known_ids: Whether the tokenizer has each of the head's outputs.
        settings: The size of batches, and what is kept of a distribution.
        salt: Seeds the draws, with each row.
    """
    device = lm.head_device
    on_device = torch.from_numpy(known_ids).to(device)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start_batch(rows: TokenRows) -> HostCopy:
        record = record_batch(lm, on_device, rows, settings, salt)
        return HostCopy(record, [len(row) for row in rows], stream)

    return BatchScorer(
        start_batch, batch_tokens=settings.batch_tokens, boundaries=lm.length_boundaries
    )


@torch.inference_mode()
def record_batch(
    lm: CausalLM,
    known_ids: Bool[torch.Tensor, " vocab"],
    rows: TokenRows,
    settings: CaptureSettings,
    salt: str,
) -> TopLogprobs:
    """Compute the records of one batch, flat over its rows, on the device of the LLM's head.

    Args:
        lm: The LLM.
        known_ids: Whether the tokenizer has each of the head's outputs; on the same device.
        rows: Token ids.
        settings: What is kept of a distribution.
        salt: Seeds the draws, with each row.
    """
    hidden = lm.hidden_states(_send(pad_rows(list(rows)), lm.device))
    lengths = torch.tensor([len(row) for row in rows])
    is_text = torch.arange(hidden.shape[1])[None] < lengths[:, None]
    at = _send(is_text.flatten().nonzero()[:, 0], lm.head_device)
    next_ids = np.concatenate([np.append(row[1:], -1) for row in rows]).astype(np.int64)
    return keep_top_k(
        hidden.flatten(0, 1)[at],
        lm,
        known_ids,
        _send(torch.from_numpy(next_ids), lm.head_device),
        _send(make_noise(rows, settings.num_draws, salt), lm.head_device),
        top_k=settings.kept_entries,
        chunk_positions=settings.chunk_positions,
    )


class HostCopy:
    """A batch's records on their way from a GPU into pinned memory, on a stream of their own."""

    def __init__(
        self, record: TopLogprobs, lengths: list[int], stream: torch.cuda.Stream | None
    ) -> None:
        self.record, self.lengths, self.event = record, lengths, None
        if stream is None:  # on a CPU the records are where they belong
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            self.record = record.map(_start_copy)
            self.event = stream.record_event()
        for tensor in vars(record).values():
            # Else the allocator, which knows one stream, reuses the memory before it is copied.
            tensor.record_stream(stream)

    def wait(self) -> list[TopLogprobs]:
        """Return each row's record, once all are on the host."""
        if self.event is not None:
            self.event.synchronize()
        return self.record.split_rows(self.lengths)


def _start_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Start copying a tensor from the GPU to the host, on the current stream."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device without waiting for the copy."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
