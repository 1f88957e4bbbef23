"""The columns of conversations: messages as JSON, and where the answers are in the tokens."""

import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from rayfuse.models.chat import ChatTokens, Message
from rayfuse.schema import ANSWERS, MESSAGES, ints
from rayfuse.storage.codec import build_list_column, flatten_column


def has_answers(rows: pa.Table) -> bool:
    """Check if rows are conversations."""
    return ANSWERS.name in rows.column_names


def encode_messages(messages: Sequence[Message]) -> str:
    """Encode a conversation as stored."""
    plain = [{key: value for key, value in asdict(m).items() if value} for m in messages]
    return json.dumps(plain, ensure_ascii=False)


def read_messages(rows: pa.Table) -> list[list[Message]]:
    """Read the conversation of each row."""
    return [
        [Message(**{"content": ""} | message) for message in json.loads(text)]
        for text in rows[MESSAGES.name].to_pylist()
    ]


def append_answers(rows: pa.Table, tokens: Sequence[ChatTokens | None]) -> pa.Table:
    """Append the column `answers`; empty for rows without tokens."""
    flat = [np.zeros(0, np.int64) if row is None else row.answers.reshape(-1) for row in tokens]
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in flat])]).astype(np.int64)
    values = np.concatenate([np.zeros(0, np.int64), *flat]).astype(np.int32)
    return rows.append_column(ANSWERS, build_list_column(values, offsets, ints))


def read_answers(
    rows: pa.Table,
) -> tuple[Int[np.ndarray, "answers 3"], Int[np.ndarray, " rows_plus_1"]]:
    """Read the answers of all rows, as in `ChatTokens`, and where those of each row begin."""
    values, offsets = flatten_column(rows, ANSWERS.name)
    return values.reshape(-1, 3).astype(np.int64), offsets // 3


def mask_learned(
    rows: pa.Table, offsets: Int[np.ndarray, " rows_plus_1"]
) -> Bool[np.ndarray, " tokens"]:
    """Mask the positions before tokens of answers and of the ends of their turns.

    Args:
        rows: Rows with the column `answers`.
        offsets: Where the tokens of each row begin, and the end of the last.
    """
    answers, numbers = read_answers(rows)
    starts = np.repeat(offsets[:-1], np.diff(numbers))
    changes = np.zeros(offsets[-1] + 1, dtype=np.int64)
    np.add.at(changes, starts + answers[:, 0] - 1, 1)
    np.add.at(changes, starts + answers[:, 2] - 1, -1)
    return np.cumsum(changes[:-1]) > 0
