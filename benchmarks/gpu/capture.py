"""Capture of one source: the engine's throughput, beside the bare forward pass of the library."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from benchmarks.gpu.models import build_model
from benchmarks.gpu.rates import describe_rate, read_memory
from benchmarks.timing import time_interleaved
from rayfuse.capture.engines.base import Failure
from rayfuse.capture.engines.memory import BatchScorer
from rayfuse.capture.engines.transformers_engine import score_with
from rayfuse.capture.top_k import keep_top_k
from rayfuse.config.capture import CaptureSettings
from rayfuse.models.batching import batch_by_tokens, pad_rows
from rayfuse.models.causal_lm import CausalLM
from rayfuse.train.throughput import measure_size

SALT = "benchmark"


@dataclass(frozen=True)
class Capture:
    """A source in memory, and rows of random tokens."""

    lm: CausalLM
    rows: list[np.ndarray]
    settings: CaptureSettings

    @property
    def known_ids(self) -> np.ndarray:
        """All ids: a random model has no tokenizer."""
        return np.ones(self.lm.head.out_features, dtype=bool)

    @property
    def num_tokens(self) -> int:
        """The tokens of all rows."""
        return sum(len(row) for row in self.rows)

    @property
    def flops(self) -> int:
        """The FLOPs of a forward pass over all rows."""
        squares = sum(len(row) ** 2 for row in self.rows)
        return measure_size(self.lm.model, self.lm.head.weight).count_forward(
            self.num_tokens, squares
        )

    @cached_property
    def batches(self) -> list[torch.Tensor]:
        """The engine's batches, on the device."""
        lengths = [len(row) for row in self.rows]
        return [
            pad_rows([self.rows[index] for index in batch]).to(self.lm.device)
            for batch in batch_by_tokens(lengths, self.settings.batch_tokens)
        ]

    def build_scorer(self) -> BatchScorer:
        """Build the engine's scorer of rows."""
        return score_with(self.lm, self.known_ids, self.settings, salt=SALT)

    def run_library(self) -> None:
        """Run the library's forward pass, which ends in full logits."""
        for batch in self.batches:
            self.lm.model(input_ids=batch, use_cache=False)

    def run_body(self) -> list[torch.Tensor]:
        """Run the body alone, and return the head's inputs."""
        return [self.lm.hidden_states(batch).flatten(0, 1) for batch in self.batches]

    def run_head(self, hidden: list[torch.Tensor]) -> None:
        """Run the head's product alone."""
        for states in hidden:
            for part in states.split(self.settings.chunk_positions):
                self.lm.logits(part)

    def run_reduction(self, hidden: list[torch.Tensor]) -> None:
        """Run the head's product, and reduce the logits to the record."""
        known = torch.from_numpy(self.known_ids).to(self.lm.device)
        for states in hidden:
            keep_top_k(
                states,
                self.lm,
                known,
                next_ids=torch.zeros(len(states), dtype=torch.long, device=self.lm.device),
                noise=torch.zeros(len(states), 0, device=self.lm.device),
                top_k=self.settings.kept_entries,
                chunk_positions=self.settings.chunk_positions,
            )


def build_capture(model: str, device: torch.device, tokens: int, row_tokens: int) -> Capture:
    """Build a source and rows of equal length, with the default settings."""
    lm = build_model(model, device)
    random = np.random.default_rng(0)
    rows = random.integers(lm.head.out_features, size=(tokens // row_tokens, row_tokens))
    return Capture(lm, list(rows), CaptureSettings())


@torch.inference_mode()
def measure_capture(
    model: str, device: str, tokens: int, row_tokens: int, rounds: int
) -> dict[str, float]:
    """Measure the engine, the library's forward pass and the parts of the engine, interleaved."""
    place = torch.device(device)
    capture = build_capture(model, place, tokens, row_tokens)
    scorer, hidden = capture.build_scorer(), capture.run_body()
    records = scorer.score_rows(capture.rows)
    assert not any(isinstance(record, Failure) or not record.is_finite() for record in records)
    timings = time_interleaved(
        {
            "engine": lambda: scorer.score_rows(capture.rows),
            "library": capture.run_library,
            "body": capture.run_body,
            "head": lambda: capture.run_head(hidden),
            "reduction": lambda: capture.run_reduction(hidden),
        },
        place,
        rounds=rounds,
    )
    seconds = timings.median("engine")
    reduction = timings.ratio("reduction", "engine") - timings.ratio("head", "engine")
    return {
        "share_of_bare_forward": timings.ratio("library", "engine"),
        "tokens_per_second": capture.num_tokens / seconds,
        "library_tokens_per_second": capture.num_tokens / timings.median("library"),
        **describe_rate(capture.flops, seconds, place),
        "body_share": timings.ratio("body", "engine"),
        "head_share": timings.ratio("head", "engine"),
        "top_k_share": reduction,
        "weights": sum(weight.numel() for weight in capture.lm.model.parameters()),
        "batch_tokens": scorer.batch_tokens,
        **read_memory(place),
    }


@torch.inference_mode()
def compare_batch_sizes(
    model: str, device: str, tokens: int, row_tokens: int, rounds: int, sizes: list[int]
) -> dict[str, float]:
    """Measure the engine with batches of several sizes, relative to the default one."""
    place = torch.device(device)
    capture = build_capture(model, place, tokens, row_tokens)
    scorers = {
        size: Capture(capture.lm, capture.rows, CaptureSettings(batch_tokens=size)).build_scorer()
        for size in sorted({*sizes, capture.settings.batch_tokens})
    }
    timings = time_interleaved(
        {
            str(size): lambda scorer=scorer: scorer.score_rows(capture.rows)
            for size, scorer in scorers.items()
        },
        place,
        rounds=rounds,
    )
    default = str(capture.settings.batch_tokens)
    speeds = {f"speed_at_{size}": timings.ratio(default, str(size)) for size in scorers}
    kept = {f"batch_tokens_of_{size}": scorer.batch_tokens for size, scorer in scorers.items()}
    return speeds | kept | read_memory(place)
