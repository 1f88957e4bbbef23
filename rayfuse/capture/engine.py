"""A source LLM that answers with top-k records."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int

from rayfuse.capture.top_k import TopLogprobs, keep_top_k
from rayfuse.model_files import load_recipe_tokenizer
from rayfuse.models import batch_by_tokens, load_causal_lm, pad_rows, resolve_dtype
from rayfuse.recipe import CaptureSettings, ModelSettings

TokenRows = Sequence[Int[np.ndarray, " _"]]


@runtime_checkable
class Engine(Protocol):
    """Scores rows of token ids; holds the weights."""

    def score_rows(self, rows: TokenRows) -> list[TopLogprobs]:
        """Return each row's record, in the order of the rows."""
        ...


LoadEngine = Callable[[ModelSettings, CaptureSettings], Engine]


class TransformersEngine:
    """A Hugging Face model in this process, on its GPU if it has one."""

    def __init__(self, source: ModelSettings, settings: CaptureSettings) -> None:
        self.settings = settings
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.lm = load_causal_lm(
            source.model,
            dtype=resolve_dtype(source.dtype, device),
            device=device,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
        )
        tokenizer = load_recipe_tokenizer(source)
        known = np.zeros(self.lm.head.out_features, dtype=bool)
        known[: tokenizer.vocab_size] = tokenizer.known_ids()
        self.known_ids = torch.from_numpy(known).to(device)

    def score_rows(self, rows: TokenRows) -> list[TopLogprobs]:
        """Return each row's record, in the order of the rows."""
        results: dict[int, TopLogprobs] = {}
        lengths = [len(row) for row in rows]
        for batch in batch_by_tokens(lengths, self.settings.batch_tokens):
            records = self._score_batch([rows[index] for index in batch])
            results |= dict(zip(batch, records, strict=True))
        return [results[index] for index in range(len(rows))]

    @torch.inference_mode()
    def _score_batch(self, rows: TokenRows) -> list[TopLogprobs]:
        hidden = self.lm.hidden_states(pad_rows(list(rows)).to(self.lm.device))
        return [
            keep_top_k(
                hidden[index, : len(row)],
                self.lm.head,
                self.known_ids,
                torch.from_numpy(np.append(row[1:], -1).astype(np.int64)).to(self.lm.device),
                top_k=self.settings.top_k,
                chunk_positions=self.settings.chunk_positions,
            )
            for index, row in enumerate(rows)
        ]


def load_transformers_engine(source: ModelSettings, settings: CaptureSettings) -> Engine:
    """Return the default engine."""
    return TransformersEngine(source, settings)
