"""Messages of a document, in the forms that data sets use -> a conversation of one form."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal, cast

from rayfuse.models.chat import Message, Role

ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "user"),
}
"""Names of roles, and what they are for a template; results of tools are given to the model."""

TOOL_ROLES = frozenset(("tool", "function", "observation", "ipython"))

ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
"""Keys of a message: OpenAI's, and ShareGPT's."""

THOUGHTS = re.compile(r"\s*(?:<think>)?(?:(?!<think>).)*?</think>\s*", re.DOTALL)
"""What a reasoning model writes before its answer; some templates write the first tag."""

Thinking = Literal["keep", "drop", "context"]


def parse_messages(value: object, thinking: Thinking) -> tuple[Message, ...]:
    """Parse the messages of a document: a list of them, or a pair of prompt and response.

    Contents are stripped, as many templates strip them. Messages of one role in a row are joined,
    calls of tools and their results become text, and messages after the last answer are removed.

    Args:
        value: Dictionaries with `role` and `content`, or `from` and `value`; or two texts.
        thinking: What happens to the `<think>` parts of answers (`corpus.thinking`).

    Raises:
        ValueError: It is no conversation with an answer; the message is a reject's reason.
    """
    if isinstance(value, str | bytes):
        value = _decode_json(value)
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("no messages: the field holds no list of them")
    items = cast(Sequence[object], value)
    if len(items) == 2 and all(isinstance(item, str | bytes) for item in items):
        items = [
            {"role": role, "content": item}
            for role, item in zip(("user", "assistant"), items, strict=True)
        ]
    messages = [_parse_message(item, number, thinking) for number, item in enumerate(items, 1)]
    # An empty system message, as many data sets have, is none.
    messages = [message for message in messages if message.content or message.role != "system"]
    messages = _join_equal_roles(messages)
    if any(message.role == "system" for message in messages[1:]):
        raise ValueError("unusable messages: a system message is not the first")
    while messages and messages[-1].role != "assistant":
        messages.pop()
    if not messages:
        raise ValueError("no answer: no message is the assistant's")
    return tuple(messages)


def _decode_json(value: str | bytes) -> object:
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError("no messages: the field holds a text that is no JSON list") from error
    except RecursionError as error:
        raise ValueError("no messages: nested too deep") from error


def _parse_message(item: object, number: int, thinking: Thinking) -> Message:
    if not isinstance(item, Mapping):
        raise ValueError(f"unusable messages: message {number} is no object with role and content")
    message = cast(Mapping[str, Any], item)
    name = _find(message, ROLE_KEYS)
    if not isinstance(name, str) or name.lower() not in ROLES:
        raise ValueError(
            f"unknown role: {str(name)[:40]!r} of message {number}; it may be "
            f"{', '.join(sorted(ROLES))}"
        )
    role = ROLES[name.lower()]
    content = _read_content(_find(message, CONTENT_KEYS), number)
    if name.lower() in TOOL_ROLES:
        content = f"<tool_response>\n{content}\n</tool_response>"
    if role != "assistant":
        if not content and role == "user":
            raise ValueError(f"empty message: message {number}")
        return Message(role, content)
    parsed = _split_thoughts(content, message, thinking)
    calls = message.get("tool_calls") or []
    if calls:
        parsed = replace(parsed, content=_write_calls(parsed.content, calls, number))
    if not parsed.content:
        raise ValueError(f"empty answer: message {number}")
    return parsed


def _find(message: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((message[key] for key in keys if message.get(key) is not None), None)


def _read_content(value: object, number: int) -> str:
    """Read a text, or the texts of a list of parts; anything else than text is refused."""
    if value is None:
        return ""
    if isinstance(value, list):
        parts = cast(list[object], value)
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"no text: message {number} has a part that is no text")
        value = "".join(cast(list[str], texts))
    if isinstance(value, bytes):
        value = value.decode("utf-8")
    if not isinstance(value, str):
        raise ValueError(f"no text: the content of message {number} is no text")
    return value.strip()


def _split_thoughts(content: str, message: Mapping[str, Any], thinking: Thinking) -> Message:
    """Separate an answer from the thoughts before it."""
    own = next(
        (message[key] for key in ("reasoning_content", "thinking") if message.get(key)), None
    )
    if isinstance(own, str):
        content = f"<think>\n{own.strip()}\n</think>\n\n{content}"
    found = THOUGHTS.match(content)
    if found is None or thinking == "keep":
        return Message("assistant", content)
    answer = content[found.end() :]
    context = content[: found.end()] if thinking == "context" else ""
    return Message("assistant", answer, context=context)


def _write_calls(content: str, calls: object, number: int) -> str:
    """Write calls of tools as text, in the form that Hermes models use."""
    if not isinstance(calls, list):
        raise ValueError(f"unusable messages: tool_calls of message {number} is no list")
    lines = [content] if content else []
    for call in cast(list[object], calls):
        function = call.get("function", call) if isinstance(call, dict) else call
        try:
            written = json.dumps(_decode_arguments(function), ensure_ascii=False)
        except TypeError as error:
            raise ValueError(
                f"unusable messages: tool_calls of message {number} are no JSON values"
            ) from error
        lines.append(f"<tool_call>\n{written}\n</tool_call>")
    return "\n".join(lines)


def _decode_arguments(function: object) -> object:
    """Decode the arguments of a call, which OpenAI's interface writes as a JSON string."""
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        with suppress(ValueError):
            return function | {"arguments": json.loads(function["arguments"])}
    return function


def _join_equal_roles(messages: Sequence[Message]) -> list[Message]:
    """Join messages of one role in a row: most templates demand that roles alternate."""
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1].role == message.role:
            content = f"{joined[-1].content}\n\n{message.content}"  # thoughts in between go
            joined[-1] = replace(joined[-1], content=content)
        else:
            joined.append(message)
    return joined
