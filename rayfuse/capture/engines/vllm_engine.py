"""A source LLM in vLLM, for models that do not fit one GPU.

The package `vllm` is an extra and takes seconds to import, so only `VllmEngine` imports it.
"""

import os
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from rayfuse.capture.engines.base import (
    EngineMemoryError,
    Failure,
    TokenRows,
    score_in_windows,
)
from rayfuse.capture.top_k import MIN_RESOLVED_TAIL, TopLogprobs
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import SourceSettings
from rayfuse.models.files import load_recipe_tokenizer, read_model_files

MEMORY_SHARE = 0.85
"""Of an actor's share of its GPU: vLLM allocates it at once. A prompt's logits come on top."""

MAX_SEQUENCES = 1024
"""Rows that vLLM schedules at a time."""


class VllmEngine:
    """A model in vLLM, on all GPUs of its actor."""

    def __init__(self, source: SourceSettings, settings: CaptureSettings) -> None:
        # Keep vLLM's core in this process: tensors are not serialised, and it ends with the actor.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        import vllm  # an extra, slow to import  # pyright: ignore[reportMissingImports]

        gpus = source.gpus or 0.0
        self.batch_tokens, self.top_k = settings.batch_tokens, settings.kept_entries
        llm = vllm.LLM(
            model=source.model,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            dtype=source.dtype,
            load_format="safetensors",
            skip_tokenizer_init=True,
            tensor_parallel_size=max(int(gpus), 1),
            distributed_executor_backend="mp" if gpus > 1 else "uni",
            gpu_memory_utilization=MEMORY_SHARE * (min(gpus, 1.0) or 1.0),
            enforce_eager=gpus == 0,
            enable_prefix_caching=False,
            max_num_batched_tokens=self.batch_tokens,
            max_num_seqs=min(self.batch_tokens, MAX_SEQUENCES),
            max_logprobs=self.top_k,
        )
        self.engine: Any = llm.llm_engine
        # One less: vLLM always generates a token after the prompt.
        self.context_tokens = int(self.engine.model_config.max_model_len) - 1
        self.sampling = vllm.SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprobs=self.top_k,
            prompt_logprobs=self.top_k,
            detokenize=False,
        )
        head_width = read_model_files(source).head_width
        known = load_recipe_tokenizer(source).known_ids()
        unknown_ids = np.setdiff1d(np.arange(head_width), known.nonzero()[0]).tolist()
        llm.apply_model(partial(_mask_ids, unknown_ids=unknown_ids))

    def score_rows(self, rows: TokenRows) -> list[TopLogprobs | Failure]:
        """Score rows, and return one result per row in the same order.

        Rows beyond the context length are scored in windows.

        Raises:
            EngineMemoryError: A batch does not fit the memory.
        """
        try:
            return score_in_windows(rows, self.context_tokens, self._score_windows)
        except torch.OutOfMemoryError as error:
            raise EngineMemoryError(
                f"vllm is out of memory ({error}); lower batch_tokens ({self.batch_tokens}), then "
                "run the same command again"
            ) from error

    def _score_windows(self, rows: TokenRows) -> list[TopLogprobs | Failure]:
        """Score rows within the context length.

        This drives the engine's core directly: `LLM.generate` builds a Python object for every
        log-probability.
        """
        core, tasks = self.engine.engine_core, self.engine.get_supported_tasks()
        for index, row in enumerate(rows):
            request = self.engine.input_processor.process_inputs(
                str(index),
                {"type": "token", "prompt_token_ids": row.tolist()},
                self.sampling,
                supported_tasks=tasks,
            )
            core.add_request(request)
        records: dict[int, TopLogprobs | Failure] = {}
        prompts: dict[str, Any] = {}
        while len(records) < len(rows):
            for output in core.get_output().outputs:
                prompts.setdefault(output.request_id, output.new_prompt_logprobs_tensors)
                if output.finished:
                    prompt = prompts.pop(output.request_id)
                    records[int(output.request_id)] = _join_record(prompt, output.new_logprobs)
        return [records[index] for index in range(len(rows))]


def _mask_ids(model: Any, unknown_ids: list[int]) -> None:
    """Make a model's logits -inf for ids that its tokenizer lacks, before they are normalised."""
    compute_logits: Any = model.compute_logits

    def compute_known(hidden: torch.Tensor) -> torch.Tensor | None:
        logits = compute_logits(hidden)
        if logits is not None:  # with tensor parallelism, only rank 0 has logits
            logits[:, unknown_ids] = -torch.inf
        return logits

    model.compute_logits = compute_known


def _join_record(prompt: Any, last: Any) -> TopLogprobs:
    """Build a row's record from vLLM's outputs for the prompt and for the generated token.

    In both, column 0 of a position is the next or the generated token, and the others are the
    likeliest tokens.

    Args:
        prompt: Log-probabilities of the prompt, for all positions but the last; None for a row of
            one token.
        last: Those after the prompt's last token.
    """
    ids: Int[np.ndarray, "seq_len top_k_plus_1"] = last.logprob_token_ids
    logprobs: Float[np.ndarray, "seq_len top_k_plus_1"] = last.logprobs
    if prompt is not None:
        ids = np.concatenate([prompt.logprob_token_ids.cpu().numpy(), ids])
        logprobs = np.concatenate([prompt.logprobs.cpu().numpy(), logprobs])
    top = logprobs[:, 1:].astype(np.float32)
    next_logprobs = logprobs[:, 0].astype(np.float32)
    next_logprobs[-1] = 0.0  # of the generated token, which is not in the text
    tail = np.log(np.maximum(1 - np.exp(top.astype(np.float64)).sum(axis=1), MIN_RESOLVED_TAIL))
    return TopLogprobs(
        top_ids=np.where(top == -np.inf, -1, ids[:, 1:]).astype(np.int32),
        top_logprobs=top,
        tail_logprobs=tail.astype(np.float32),
        next_logprobs=next_logprobs,
        drawn_ids=np.zeros((len(top), 0), dtype=np.int32),
    )
