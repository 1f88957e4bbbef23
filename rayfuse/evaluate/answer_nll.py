"""Held-out conversations -> the NLL of their answers under one model, in its own chat template."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from rayfuse.config.base import UserError
from rayfuse.evaluate.bits_per_byte import check_finite, score_in_windows
from rayfuse.evaluate.ensemble import TokenNLL
from rayfuse.models.causal_lm import CausalLM
from rayfuse.models.chat import ChatError, ChatFormat, ChatTokens, Message
from rayfuse.storage.chat_columns import read_messages


def score_answers(
    lm: CausalLM,
    chat: ChatFormat,
    rows: pa.Table,
    *,
    name: str,
    batch_tokens: int,
    context_tokens: int | None = None,
) -> list[TokenNLL]:
    """Compute the NLL of each row's answers, token by token, end to end.

    Ends of turns are not scored: they spell no bytes.

    Args:
        lm: The model.
        chat: Its chat template.
        rows: CORPUS columns, of which `row_id` and `messages` are read.
        name: The model's name in error messages.
        batch_tokens: Tokens of one forward pass, padding included.
        context_tokens: The model's context length; longer rows are scored in windows.

    Raises:
        UserError: The template cannot represent a row, or a log-probability is not finite.
    """
    conversations = read_messages(rows)
    row_ids: list[str] = rows["row_id"].to_pylist()
    tokens: list[ChatTokens] = []
    for row_id, encoded in zip(row_ids, chat.encode(conversations), strict=True):
        if isinstance(encoded, ChatError):
            raise UserError(
                f"model {name} cannot be scored on row {row_id!r}: {encoded}; set "
                "corpus.resplit: true, which rejects what a template of the recipe refuses"
            )
        tokens.append(encoded)
    nats = score_in_windows(lm, [row.ids for row in tokens], batch_tokens, context_tokens)
    check_finite(name, row_ids, nats)
    parts = zip(tokens, conversations, nats, strict=True)
    return [_take_answers(chat, *part) for part in parts]


def _take_answers(
    chat: ChatFormat,
    row: ChatTokens,
    messages: Sequence[Message],
    nats: Float[np.ndarray, " tokens_minus_1"],
) -> TokenNLL:
    """Take the NLL of the tokens of a row's answers, and where each ends in their bytes."""
    answers = [message.content for message in messages if message.role == "assistant"]
    ends: list[Int[np.ndarray, " _"]] = [np.zeros(0, dtype=np.int64)]
    taken: list[Float[np.ndarray, " _"]] = [np.zeros(0)]
    done = 0
    for (start, stop, _), answer in zip(row.answers.tolist(), answers, strict=True):
        lengths = [len(chat.tokenizer.token_bytes[i] or b"") for i in row.ids[start:stop].tolist()]
        num_bytes = len(answer.encode())
        lengths[0] -= sum(lengths) - num_bytes  # a space of the template, which it also spells
        ends.append(done + np.cumsum(lengths))
        taken.append(nats[start - 1 : stop - 1])
        done += num_bytes
    return TokenNLL(np.concatenate(ends), np.concatenate(taken))
