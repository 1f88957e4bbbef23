"""Conversations -> rows: divided between turns, so that the chat template of every model fits."""

from collections.abc import Sequence
from dataclasses import replace

from rayfuse.corpus.documents import Document
from rayfuse.corpus.split import Row, move_to_space
from rayfuse.models.chat import ChatError, ChatFormat, Message

MAX_TOKEN_CHARS = 8
"""Characters of a token, at most, in nearly any text: a longer answer is first cut to as many."""


def split_conversation(
    document: Document, formats: Sequence[ChatFormat], max_tokens: int
) -> list[Row]:
    """Divide a conversation into rows between its turns; each begins with the system message.

    An answer that does not fit with the message before it loses its end.

    Args:
        document: A conversation.
        formats: Each row fits all of them.
        max_tokens: Maximum tokens of a row, those of the template included.

    Raises:
        ChatError: A template cannot represent the conversation, or a message before an answer is
            too long.
    """
    messages = list(document.messages)
    system = messages[:1] if messages[0].role == "system" else []
    turns = _list_turns(messages[len(system) :])
    rows: list[list[Message]] = []
    start = 0
    while start < len(turns):
        stop = start
        row = list(system)
        for turn in turns[start:]:
            if not _fits([*row, *turn], formats, max_tokens):
                break
            row += turn
            stop += 1
        if stop == start:
            row = _cut_answer([*system, *turns[start]], formats, max_tokens)
            stop += 1
        rows.append(row)
        start = stop
    last = len(rows) - 1
    return [
        Row(document, place, join_answers(row), place == last, tuple(row))
        for place, row in enumerate(rows)
    ]


def join_answers(messages: Sequence[Message]) -> str:
    """Join the answers of a row: the text that is learned and scored."""
    return "".join(message.content for message in messages if message.role == "assistant")


def _list_turns(messages: Sequence[Message]) -> list[list[Message]]:
    """Group messages into turns: what is put to the model, and its answer."""
    turns: list[list[Message]] = [[]]
    for message in messages:
        turns[-1].append(message)
        if message.role == "assistant":
            turns.append([])
    return turns[:-1]


def _fits(messages: Sequence[Message], formats: Sequence[ChatFormat], max_tokens: int) -> bool:
    return all(len(form.encode_one(messages).ids) <= max_tokens for form in formats)


def _cut_answer(
    messages: list[Message], formats: Sequence[ChatFormat], max_tokens: int
) -> list[Message]:
    """Shorten the answer at the end, near a line end or space, by as little as needed."""
    *before, answer = messages
    low, high = 0, min(len(answer.content), MAX_TOKEN_CHARS * max_tokens)
    while low < high:  # the longest beginning that fits
        middle = (low + high + 1) // 2
        shorter = replace(answer, content=answer.content[:middle].rstrip(), is_cut=True)
        if _fits([*before, shorter], formats, max_tokens):
            low = middle
        else:
            high = middle - 1
    content = answer.content[: move_to_space(answer.content, low)].rstrip() if low else ""
    if not content:
        raise ChatError(
            f"the messages before an answer fill a row of corpus.max_tokens {max_tokens}"
        )
    return [*before, replace(answer, content=content, is_cut=True)]
