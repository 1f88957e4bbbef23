"""A source LLM that answers with top-k records."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int

from rayfuse.capture.sampling import make_noise
from rayfuse.capture.top_k import TopLogprobs, TopTensors, join_parts, keep_top_k
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import ModelSettings, SourceSettings
from rayfuse.models.batching import batch_by_tokens, cut_windows, pad_rows
from rayfuse.models.causal_lm import is_out_of_memory, load_causal_lm
from rayfuse.models.files import load_recipe_tokenizer, read_model_files

TokenRows = Sequence[Int[np.ndarray, " _"]]

MEMORY_PAUSES = (1.0, 5.0, 25.0)
"""Seconds before a row that alone found no memory is tried again: others may give some back."""

FATAL = "CUDA error"
"""Begins what a GPU says that will answer nothing any more."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """Why a row has no record."""

    reason: str


NO_MEMORY_ALONE = Failure("out of memory")


class EngineMemoryError(RuntimeError):
    """Not even half of one row finds memory: it is not the row's fault."""


@runtime_checkable
class Engine(Protocol):
    """Scores rows of token ids; holds the weights."""

    batch_tokens: int
    """Tokens of a batch by now; fewer than the recipe says once memory ran out."""

    def score_rows(self, rows: TokenRows) -> list[TopLogprobs | Failure]:
        """Return each row's record, in the order of the rows.

        Raises:
            EngineMemoryError: There is no memory, for none of the rows.
        """
        ...


LoadEngine = Callable[[SourceSettings, CaptureSettings], Engine]


class TransformersEngine:
    """A Hugging Face model in this process, on its GPU if it has one."""

    def __init__(self, source: ModelSettings, settings: CaptureSettings) -> None:
        self.settings = settings
        self.batch_tokens = settings.batch_tokens
        self.too_long_tokens: float = math.inf
        """Rows of so many were tried again and again, and found no memory."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.lm = load_causal_lm(source, device)
        tokenizer = load_recipe_tokenizer(source)
        known = np.zeros(self.lm.head.out_features, dtype=bool)
        known[: tokenizer.vocab_size] = tokenizer.known_ids()
        self.known_ids = torch.from_numpy(known).to(device)
        files = read_model_files(source.model, source.revision)
        self.salt, self.context_tokens = files.identity, files.context_tokens
        self.copies = torch.cuda.Stream() if device == "cuda" else None

    def score_rows(self, rows: TokenRows) -> list[TopLogprobs | Failure]:
        """Return each row's record, in the order of the rows.

        A row longer than the model takes is scored in windows.
        """
        return score_in_windows(rows, self.context_tokens, self._score_windows)

    def _score_windows(self, rows: TokenRows) -> list[TopLogprobs | Failure]:
        """Return the records of rows that the model takes.

        A row that alone finds no memory is tried again later: the shortage may pass. Where half of
        it fits then, the row is too long for this machine; where not, the machine is short.
        """
        batch_tokens = self.batch_tokens
        results = self._score_batches(rows, list(range(len(rows))))
        for pause in MEMORY_PAUSES:
            short = self._list_short(rows, results)
            if not short:
                break
            time.sleep(pause)
            results |= self._score_batches(rows, short)
            if len(self._list_short(rows, results)) < len(short):
                self.batch_tokens = batch_tokens  # what was too large then may fit again
        for index in self._list_short(rows, results):
            self._check_half(rows[index])
        return [results[index] for index in range(len(rows))]

    def _list_short(self, rows: TokenRows, results: dict[int, TopLogprobs | Failure]) -> list[int]:
        """Return the rows that found no memory and are short enough to find some yet."""
        return [
            index
            for index, result in results.items()
            if result == NO_MEMORY_ALONE and len(rows[index]) < self.too_long_tokens
        ]

    def _check_half(self, row: Int[np.ndarray, " _"]) -> None:
        """Learn that a row is too long, so that none like it is waited for.

        Raises:
            EngineMemoryError: Half of it finds no memory either.
        """
        half = row[: max(len(row) // 2, 1)]
        if any(answer == NO_MEMORY_ALONE for _, answer in self._score_parts([half])):
            raise EngineMemoryError(
                f"there is no memory for {len(half)} tokens, {sum(MEMORY_PAUSES):.0f} s after it "
                "ran out; free it or give the actors another machine, then run the same command "
                "again"
            )
        self.too_long_tokens = min(self.too_long_tokens, len(row))

    def _score_batches(
        self, rows: TokenRows, indices: list[int]
    ) -> dict[int, TopLogprobs | Failure]:
        """Return the records of some rows.

        A batch that does not fit the memory is cut in two, and later ones are smaller. A batch that
        the model fails on is halved until the row is found that it fails on.
        """
        results: dict[int, TopLogprobs | Failure] = {}
        lengths = [len(row) for row in rows]
        waiting: tuple[list[int], HostCopy] | None = None
        for places in batch_by_tokens([lengths[index] for index in indices], self.batch_tokens):
            batch = [indices[place] for place in places]
            for part, answer in self._score_parts([rows[index] for index in batch]):
                found = batch[part]
                if isinstance(answer, Failure):
                    results |= dict.fromkeys(found, answer)
                    continue
                copy = HostCopy(answer, self.copies)
                if waiting:  # the last batch's record travels while this one is computed
                    results |= _split_record(*waiting, lengths)
                waiting = (found, copy)
        if waiting:
            results |= _split_record(*waiting, lengths)
        return results

    def _score_parts(self, rows: TokenRows) -> Iterator[tuple[slice, TopTensors | Failure]]:
        """Yield the records of a batch in as many parts as it takes, each with its rows."""
        parts = [slice(0, len(rows))]
        while parts:
            part = parts.pop()
            try:
                record = self._score_batch(rows[part])
            except (RuntimeError, ValueError, IndexError, MemoryError) as error:
                is_full = is_out_of_memory(error)
                if str(error).startswith(FATAL) and not is_full:
                    raise
                failure = (
                    NO_MEMORY_ALONE if is_full else Failure(f"model fails: {_first_line(error)}")
                )
            else:
                yield part, record
                continue
            # Here the error is gone, and with it the tensors that its frames held.
            if is_full:
                self._shrink_batches(sum(len(row) for row in rows[part]))
            if part.stop - part.start == 1:
                yield part, failure
            else:
                middle = (part.start + part.stop) // 2
                parts += [slice(middle, part.stop), slice(part.start, middle)]

    def _shrink_batches(self, num_tokens: int) -> None:
        """Take half of what did not fit for the most that does."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.batch_tokens = max(min(self.batch_tokens, num_tokens // 2), 1)
        logger.warning(
            "out of memory with %d tokens; batches are cut to %d from here on: lower "
            "capture.batch_tokens (%d)",
            num_tokens,
            self.batch_tokens,
            self.settings.batch_tokens,
        )

    @torch.inference_mode()
    def _score_batch(self, rows: TokenRows) -> TopTensors:
        device = self.lm.device
        hidden = self.lm.hidden_states(_send(pad_rows(list(rows)), device))
        lengths = torch.tensor([len(row) for row in rows])
        is_text = torch.arange(hidden.shape[1])[None] < lengths[:, None]
        at = _send(is_text.flatten().nonzero()[:, 0], device)
        following = np.concatenate([np.append(row[1:], -1) for row in rows]).astype(np.int64)
        return keep_top_k(
            hidden.flatten(0, 1)[at],
            self.lm,
            self.known_ids,
            _send(torch.from_numpy(following), device),
            _send(make_noise(rows, self.settings.num_draws, self.salt), device),
            top_k=self.settings.kept_entries,
            chunk_positions=self.settings.chunk_positions,
        )


class HostCopy:
    """A record on its way from a GPU: a stream of its own copies it, into pinned memory."""

    def __init__(self, record: TopTensors, stream: torch.cuda.Stream | None) -> None:
        self.record, self.event = record, None
        if stream is None:
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.record = TopTensors(
                *(
                    torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(
                        tensor, non_blocking=True
                    )
                    for tensor in vars(record).values()
                )
            )
            self.event = stream.record_event()
        for tensor in vars(record).values():
            tensor.record_stream(stream)

    def wait(self) -> TopTensors:
        """Return the record once all of it is here."""
        if self.event is not None:
            self.event.synchronize()
        return self.record


def load_recipe_engine(source: SourceSettings, settings: CaptureSettings) -> Engine:
    """Return the engine that a recipe asks for."""
    if source.backend == "vllm":
        from rayfuse.capture.engines.vllm_engine import VllmEngine

        return VllmEngine(source, settings)
    return TransformersEngine(source, settings)


def check_backend(source: SourceSettings) -> None:
    """Check that a source's backend is installed; this needs no GPU.

    Raises:
        ValueError: It is not.
    """
    if source.backend == "vllm" and find_spec("vllm") is None:
        raise ValueError(
            f"source {source.name}: backend is 'vllm', which is not installed here; run pip "
            "install 'rayfuse[vllm]' on all machines, or use backend transformers"
        )


def score_in_windows(
    rows: TokenRows,
    context_tokens: int | None,
    score: Callable[[TokenRows], list[TopLogprobs | Failure]],
) -> list[TopLogprobs | Failure]:
    """Return each row's record, in the order of the rows.

    Args:
        rows: Token ids of any number.
        context_tokens: The most that the model takes; longer rows are scored in windows.
        score: Returns the records of rows that the model takes.
    """
    cuts = [cut_windows(len(row), context_tokens) for row in rows]
    windows = [row[cut] for row, each in zip(rows, cuts, strict=True) for cut, _ in each]
    records = iter(score(windows))
    return [_join_windows([(next(records), kept) for _, kept in each]) for each in cuts]


def _join_windows(windows: list[tuple[TopLogprobs | Failure, slice]]) -> TopLogprobs | Failure:
    parts: list[TopLogprobs] = []
    for record, kept in windows:
        if isinstance(record, Failure):
            return record
        parts.append(record.part(kept))
    return join_parts(parts)


def _split_record(
    indices: list[int], copy: HostCopy, lengths: list[int]
) -> dict[int, TopLogprobs | Failure]:
    rows = copy.wait().split_rows([lengths[index] for index in indices])
    return dict(zip(indices, rows, strict=True))


def _send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device, without waiting for the copy."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
