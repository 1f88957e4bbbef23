"""Held-out rows -> what one model pays for each."""

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float

from rayfuse.evaluate.scores import DocumentScore
from rayfuse.models import (
    CausalLM,
    batch_by_tokens,
    cut_windows,
    load_causal_lm,
    next_token_logprobs,
    resolve_dtype,
)
from rayfuse.recipe import ModelSettings
from rayfuse.tokens import TextTokenizer

CHUNK_POSITIONS = 1024
"""Positions whose logits exist at a time: 0.5 GB at 128k tokens."""


def load_scored_model(settings: ModelSettings) -> CausalLM:
    """Return a model on this process' GPU, or on its CPUs.

    Raises:
        ValueError: As for `load_causal_lm`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_causal_lm(
        settings.model,
        dtype=resolve_dtype(settings.dtype, device),
        device=device,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )


def score_rows(
    lm: CausalLM,
    tokenizer: TextTokenizer,
    rows: pa.Table,
    *,
    name: str,
    batch_tokens: int,
    context_tokens: int | None = None,
) -> Float[np.ndarray, " rows"]:
    """Return what a model pays for the text of each row, in nats.

    The text is cut by the model's own tokenizer, with its start token before it. EOS is not there:
    it spells no bytes.

    Args:
        lm: The model.
        tokenizer: The model's own.
        rows: CORPUS columns; `row_id` and `text` are read.
        name: What errors call the model.
        batch_tokens: Tokens of one forward pass, padding counted.
        context_tokens: The most tokens that the model takes; longer rows are scored in windows.

    Raises:
        ValueError: The model has no start token, so that nothing would be paid for the first token;
            or a row's log-probabilities are not finite.
    """
    if tokenizer.start_id is None:
        raise ValueError(
            f"model {name} has neither BOS nor EOS, so its first token of a text cannot be scored; "
            "name one of them in its tokenizer_config.json"
        )
    texts: list[str] = rows["text"].to_pylist()
    token_rows = tokenizer.encode_rows(texts, [False] * len(texts))
    nats = np.zeros(len(texts))
    windows = [
        (row, token_rows[row][cut], kept)
        for row in range(len(texts))
        for cut, kept in cut_windows(len(token_rows[row]), context_tokens)
    ]
    for batch in batch_by_tokens([len(tokens) for _, tokens, _ in windows], batch_tokens):
        scored = next_token_logprobs(lm, [windows[index][1] for index in batch], CHUNK_POSITIONS)
        for index, logprobs in zip(batch, scored, strict=True):
            row, _, kept = windows[index]
            nats[row] -= logprobs[kept].sum()
    broken = np.flatnonzero(~np.isfinite(nats))
    if len(broken):
        raise ValueError(
            f"model {name} gives row {rows['row_id'][int(broken[0])].as_py()!r} a log-probability "
            f"that is not finite ({len(broken)} of {len(texts)} rows); try dtype float32"
        )
    return nats


def score_documents(rows: pa.Table, nats: Float[np.ndarray, " rows"]) -> list[DocumentScore]:
    """Return each row's score under its document's name."""
    columns = (rows[name].to_pylist() for name in ("doc_id", "domain", "num_bytes"))
    return [
        DocumentScore(doc_id, domain, num_bytes, float(row_nats))
        for doc_id, domain, num_bytes, row_nats in zip(*columns, nats, strict=True)
    ]
