"""Held-out rows -> the negative log-likelihood (NLL) of each under one model."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int

from rayfuse.align.token_spans import list_token_bytes, place_tokens
from rayfuse.config.base import UserError
from rayfuse.config.models import ModelSettings
from rayfuse.evaluate.ensemble import TokenNLL
from rayfuse.evaluate.scores import DocumentScore
from rayfuse.models.batching import batch_by_tokens, cut_windows, pad_rows
from rayfuse.models.causal_lm import CausalLM, load_causal_lm, next_token_logprobs
from rayfuse.models.tokenizer import TextTokenizer
from rayfuse.storage.codec import number_documents

CHUNK_POSITIONS = 1024
"""Positions with logits in memory at a time: 0.5 GB for a vocabulary of 128k."""


def load_scored_model(settings: ModelSettings) -> CausalLM:
    """Load a model on this process' GPU, or on its CPUs if it has none.

    Raises:
        ValueError: As for `load_causal_lm`.
    """
    return load_causal_lm(settings, "cuda" if torch.cuda.is_available() else "cpu")


def score_rows(
    lm: CausalLM,
    tokenizer: TextTokenizer,
    rows: pa.Table,
    *,
    name: str,
    batch_tokens: int,
    context_tokens: int | None = None,
) -> Float[np.ndarray, " rows"]:
    """Compute the NLL of each row's text, in nats; see `score_tokens`."""
    settings = {"name": name, "batch_tokens": batch_tokens, "context_tokens": context_tokens}
    return sum_rows(score_tokens(lm, tokenizer, rows, **settings))


def score_tokens(
    lm: CausalLM,
    tokenizer: TextTokenizer,
    rows: pa.Table,
    *,
    name: str,
    batch_tokens: int,
    context_tokens: int | None = None,
) -> list[TokenNLL]:
    """Compute the NLL of each row's text, token by token.

    The text is tokenized by the model's own tokenizer, after a start token. EOS is not scored: it
    spells no bytes.

    Args:
        lm: The model.
        tokenizer: The model's own tokenizer.
        rows: CORPUS columns, of which `row_id` and `text` are read.
        name: The model's name in error messages.
        batch_tokens: Tokens of one forward pass, padding included.
        context_tokens: The model's context length; longer rows are scored in windows.

    Raises:
        UserError: The model has no start token, so the first token has no probability; or a row has
            a log-probability that is not finite.
    """
    if tokenizer.start_id is None:
        raise UserError(
            f"model {name} has neither BOS nor EOS, so its first token of a text cannot be scored; "
            "name one of them in its tokenizer_config.json"
        )
    texts: list[str] = rows["text"].to_pylist()
    token_rows = tokenizer.encode_rows(texts, [False] * len(texts))
    nats = score_in_windows(lm, token_rows, batch_tokens, context_tokens)
    check_finite(name, rows["row_id"].to_pylist(), nats)
    ends = _find_ends(token_rows, texts, tokenizer)
    return [TokenNLL(*row) for row in zip(ends, nats, strict=True)]


def check_finite(name: str, row_ids: list[str], nats: Sequence[Float[np.ndarray, " _"]]) -> None:
    """Check the log-probabilities of each row's tokens.

    Args:
        name: The model's name, for the error.
        row_ids: Of the rows.
        nats: The NLL of each row's tokens.

    Raises:
        UserError: One is not finite.
    """
    broken = [row for row, row_nats in enumerate(nats) if not np.isfinite(row_nats).all()]
    if broken:
        raise UserError(
            f"model {name} gives row {row_ids[broken[0]]!r} a log-probability that is not finite "
            f"({len(broken)} of {len(row_ids)} rows); try dtype float32"
        )


def score_in_windows(
    lm: CausalLM,
    token_rows: list[Int[np.ndarray, " _"]],
    batch_tokens: int,
    context_tokens: int | None,
) -> list[Float[np.ndarray, " _"]]:
    """Compute the NLL of each row's tokens but the first, the start token."""
    # A window: its row, the part of the row that the model reads, the part of that which counts.
    windows = [
        (row, *window)
        for row, tokens in enumerate(token_rows)
        for window in cut_windows(len(tokens), context_tokens)
    ]
    token_windows = [token_rows[row][part] for row, part, _ in windows]
    by_window: dict[int, Float[np.ndarray, " _"]] = {}
    lengths = [len(tokens) for tokens in token_windows]
    for batch in batch_by_tokens(lengths, batch_tokens, lm.length_boundaries):
        scored = next_token_logprobs(lm, [token_windows[i] for i in batch], CHUNK_POSITIONS)
        by_window |= {i: -scores[windows[i][2]] for i, scores in zip(batch, scored, strict=True)}
    by_row: list[list[Float[np.ndarray, " _"]]] = [[] for _ in token_rows]
    for i, (row, _, _) in enumerate(windows):
        by_row[row].append(by_window[i])
    return [np.concatenate(parts)[:-1] for parts in by_row]  # no token follows the last one


def _find_ends(
    token_rows: list[Int[np.ndarray, " _"]], texts: list[str], tokenizer: TextTokenizer
) -> list[Int[np.ndarray, " _"]]:
    """Find where each row's tokens end in its bytes, without the start token; see `TokenNLL`."""
    spelled = [text.encode() for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(tokens) for tokens in token_rows])])
    placed = place_tokens(
        np.concatenate(token_rows),
        offsets,
        spelled,
        list_token_bytes(tokenizer),
        [False] * len(texts),
    )
    starts = zip(offsets[:-1].tolist(), offsets[1:].tolist(), placed.row_starts, strict=True)
    ends = [placed.ends[start + 1 : stop] - byte for start, stop, byte in starts]
    for row, text in zip(ends, spelled, strict=True):
        row[-1:] = len(text)  # some tokenizers drop trailing characters of a text
    return ends


@torch.inference_mode()
def score_last(
    lm: CausalLM, rows: Sequence[Int[np.ndarray, " _"]], counts: Sequence[int]
) -> list[tuple[Float[np.ndarray, " _"], bool]]:
    """Compute the log-probabilities of each row's last tokens, and whether all are the argmax.

    Args:
        lm: The model.
        rows: Token ids, one batch.
        counts: Number of tokens to score at the end of each row, fewer than the row has.
    """
    hidden = lm.hidden_states(pad_rows(list(rows)).to(lm.device))
    results: list[tuple[Float[np.ndarray, " _"], bool]] = []
    for row, hidden_row, count in zip(rows, hidden, counts, strict=True):
        following = torch.from_numpy(row[len(row) - count :].astype(np.int64)).to(lm.device)
        states = hidden_row[len(row) - 1 - count : len(row) - 1]  # position t predicts token t + 1
        logprobs: list[np.ndarray] = [np.zeros(0)]
        is_greedy = True
        for part, ids in zip(
            states.split(CHUNK_POSITIONS), following.split(CHUNK_POSITIONS), strict=True
        ):
            logits = lm.logits(part)
            chosen = logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(1)
            logprobs.append(chosen.double().cpu().numpy())
            is_greedy &= bool((logits.argmax(1) == ids).all())
        results.append((np.concatenate(logprobs), is_greedy))
    return results


def sum_rows(rows: Sequence[TokenNLL]) -> Float[np.ndarray, " rows"]:
    """Add up the NLL of each row's tokens, in nats."""
    return np.array([row.nats.sum() for row in rows])


def score_documents(rows: pa.Table, nats: Float[np.ndarray, " rows"]) -> list[DocumentScore]:
    """Add up the NLL of each document's rows, in order.

    Args:
        rows: A shard of CORPUS rows.
        nats: The NLL of each row.
    """
    columns = (rows[name].to_pylist() for name in ("doc_id", "domain", "num_bytes"))
    documents: list[DocumentScore] = []
    for number, doc_id, domain, num_bytes, row_nats in zip(
        number_documents(rows), *columns, nats, strict=True
    ):
        if number == len(documents):
            documents.append(DocumentScore(doc_id, domain, 0, 0.0))
        total = documents[number]
        documents[number] = replace(
            total, num_bytes=total.num_bytes + num_bytes, nats=total.nats + float(row_nats)
        )
    return documents
