"""Conversations: each answer is aligned as if it were a row of its own.

Only answers are aligned. Of each, these tokens are taken: the one before the answer, where the
model predicts its beginning; the answer's own; and the end of the turn, where it is one control
token on both sides. They stand in the places of start token, text and EOS, so that all that holds
for rows of text holds for them.
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from rayfuse.align.method import Alignment
from rayfuse.align.shard import align_shard
from rayfuse.models.chat import ChatFormat
from rayfuse.models.text_tokenizer import TextTokenizer
from rayfuse.schema import CAPTURED, CORPUS, ints
from rayfuse.storage.chat_columns import read_answers, read_messages
from rayfuse.storage.codec import (
    LOWEST_LOGPROB,
    build_list_column,
    flatten_column,
    join_ranges,
)


def tokenize_answers(chat: ChatFormat) -> TextTokenizer:
    """Describe a model's tokens of answers as a tokenizer: the end of a turn is its EOS."""
    tokenizer = chat.tokenizer
    return replace(
        tokenizer,
        start_id=_find_marker(chat),
        eos_id=chat.end_id,
        is_of_answers=True,
    )


def _find_marker(chat: ChatFormat) -> int:
    """Find the token that stands for the one before an answer: any that spells nothing."""
    if chat.end_id is not None:
        return chat.end_id
    return chat.tokenizer.token_bytes.index(b"")


@dataclass(frozen=True)
class _Answers:
    """The answers of a shard on one side."""

    ids: Int[np.ndarray, " tokens"]
    """Of all rows."""
    at: Int[np.ndarray, " positions"]
    """The positions of the answers among them, answer by answer."""
    offsets: Int[np.ndarray, " answers_plus_1"]
    """Where each answer's positions begin, and the end of the last."""

    def take_ids(self, marker: int | None) -> Int[np.ndarray, " positions"]:
        """Take the answers' tokens, each after a marker."""
        ids = self.ids[self.at]
        has_tokens = np.diff(self.offsets) > 0
        ids[self.offsets[:-1][has_tokens]] = marker
        return ids


@dataclass(frozen=True)
class AnswerRows:
    """The answers of a shard as rows of their own."""

    rows: pa.Table
    """CORPUS rows, named by their number."""
    target: _Answers
    source: _Answers
    row_of: Int[np.ndarray, " answers"]
    """The conversation of each answer."""


def align_answers(
    corpus: pa.Table, captured: pa.Table, alignment: Alignment
) -> tuple[pa.Table, dict[str, float]]:
    """Align the conversations of a shard; see `align_shard`.

    Args:
        corpus: CORPUS rows with `messages` and `answers`.
        captured: CAPTURED rows with `answers`.
        alignment: Of the tokenizers that `tokenize_answers` makes.

    Raises:
        ValueError: The two tables do not hold the same rows.
    """
    answers = cut_answers(corpus, captured, alignment.target.start_id)
    names = answers.rows["row_id"].to_pylist()
    records = _take_records(captured, answers.source, names, alignment.source.start_id)
    aligned, stats = align_shard(answers.rows, records, alignment)
    return _put_back(aligned, corpus, captured, answers.target, answers.row_of), stats


def cut_answers(corpus: pa.Table, source_rows: pa.Table, marker: int | None) -> AnswerRows:
    """Cut the answers out of conversations, in the target's and in the source's tokens.

    Args:
        corpus: CORPUS rows with `messages` and `answers`.
        source_rows: The same rows with the source's `token_ids` and `answers`.
        marker: The target's token that stands for the one before an answer.

    Raises:
        ValueError: The two tables do not hold the same rows.
    """
    if corpus["row_id"].to_pylist() != source_rows["row_id"].to_pylist():
        raise ValueError("corpus and captured shard hold different rows; capture the shard again")
    places, numbers = read_answers(corpus)
    source_places, source_numbers = read_answers(source_rows)
    counts, is_scored = np.diff(numbers), np.diff(source_numbers) > 0
    if (counts[is_scored] != np.diff(source_numbers)[is_scored]).any():
        raise ValueError("a row has another number of answers than it had; capture the shard again")
    row_of = np.repeat(np.arange(len(counts)), counts)
    own = np.zeros((len(row_of), 3), dtype=np.int64)
    own[is_scored[row_of]] = source_places
    has_end = (places[:, 2] == places[:, 1] + 1) & (own[:, 2] == own[:, 1] + 1)
    target = _find_answers(corpus, "target_ids", places, row_of, has_end)
    source = _find_answers(source_rows, "token_ids", own, row_of, has_end)
    texts = [m.content for row in read_messages(corpus) for m in row if m.role == "assistant"]
    names = [f"{number}" for number in range(len(row_of))]
    pieces = pa.Table.from_pydict(
        {
            "row_id": names,
            "doc_id": names,
            "domain": [""] * len(names),
            "text": texts,
            "num_bytes": [len(text.encode()) for text in texts],
            "ends_document": has_end,
            "target_ids": build_list_column(target.take_ids(marker), target.offsets, ints),
        },
        schema=CORPUS,
    )
    return AnswerRows(pieces, target, source, row_of)


def _find_answers(
    rows: pa.Table,
    column: str,
    places: Int[np.ndarray, "answers 3"],
    row_of: Int[np.ndarray, " answers"],
    has_end: Bool[np.ndarray, " answers"],
) -> _Answers:
    ids, offsets = flatten_column(rows, column)
    is_present = places[:, 0] > 0
    starts = np.where(is_present, offsets[:-1][row_of] + places[:, 0] - 1, 0)
    lengths = np.where(is_present, places[:, 1] - places[:, 0] + 1 + has_end, 0)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    return _Answers(ids, join_ranges(starts, lengths), bounds)


def _take_records(
    captured: pa.Table, source: _Answers, names: list[str], marker: int | None
) -> pa.Table:
    """Take the records of the answers' positions, as CAPTURED rows."""
    columns: dict[str, object] = {
        "row_id": names,
        "token_ids": build_list_column(source.take_ids(marker), source.offsets, ints),
    }
    for name in ("top_ids", "top_logprobs", "tail_logprobs", "draw_ids", "draw_counts"):
        columns[name] = _take(captured, name, source)
    next_logprobs = flatten_column(captured, "next_logprobs")[0][source.at]
    has_tokens = np.diff(source.offsets) > 0
    next_logprobs[source.offsets[1:][has_tokens] - 1] = 0  # the last one predicts other text
    columns["next_logprobs"] = build_list_column(
        next_logprobs, source.offsets, CAPTURED.field("next_logprobs").type
    )
    totals = np.concatenate([[0.0], np.cumsum(next_logprobs, dtype=np.float64)])
    nats = np.where(has_tokens, totals[source.offsets[:-1]] - totals[source.offsets[1:]], np.inf)
    columns["nats"] = nats.astype(np.float32)
    return pa.Table.from_pydict(columns, schema=CAPTURED)


def _take(rows: pa.Table, name: str, answers: _Answers) -> pa.ListArray:
    """Take a column's entries at the answers' positions."""
    values = flatten_column(rows, name)[0]
    width = len(values) // max(len(answers.ids), 1)
    taken = values.reshape(-1, width)[answers.at] if width else values[:0]
    return build_list_column(
        taken.reshape(-1), answers.offsets * width, rows.schema.field(name).type
    )


def _put_back(
    aligned: pa.Table,
    corpus: pa.Table,
    captured: pa.Table,
    target: _Answers,
    row_of: Int[np.ndarray, " answers"],
) -> pa.Table:
    """Put the answers' signals at their places in the rows; other positions have none."""
    offsets = flatten_column(corpus, "target_ids")[1]
    empty = {"top_ids": -1, "tail_logprobs": LOWEST_LOGPROB}
    columns: dict[str, object] = {}
    for name in aligned.column_names:
        kind = aligned.schema.field(name).type
        if not pa.types.is_list(kind):
            continue
        values = flatten_column(aligned, name)[0]
        width = len(values) // max(len(target.at), 1)
        full = np.full((offsets[-1], width), empty.get(name, 0), dtype=values.dtype)
        full[target.at] = values.reshape(len(target.at), width)
        columns[name] = build_list_column(full.reshape(-1), offsets * width, kind)
    num_tokens = np.bincount(row_of, aligned["num_tokens"].to_numpy(), minlength=len(offsets) - 1)
    columns["row_id"], columns["nats"] = corpus["row_id"], captured["nats"]
    columns["num_tokens"] = num_tokens.astype(np.int32)
    return pa.Table.from_pydict(columns, schema=aligned.schema)
