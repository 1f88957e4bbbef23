"""A model's chat template: conversations -> tokens, and where each answer is in them.

Every model sees a conversation in its own template. What is compared between models are the bytes
of the answers; all other tokens, of the template and of the other messages, are context.

A template is a program, which may trim, rewrite, drop or add text. It is rendered twice, with the
messages and with a placeholder in place of each: unless the first is the second with the messages
put in, the template changes the messages, and the conversation cannot be used with this model.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from rayfuse.config.base import UserError, first_line, user_error_from
from rayfuse.config.models import ModelSettings, TrainedSettings
from rayfuse.models.chat_template import (
    FIXED_DATE,
    compile_template,
    read_config,
    read_template,
)
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.models.folder import (
    TOKENIZER_FILES,
    find_folder,
)
from rayfuse.models.text_tokenizer import TextTokenizer, hide_name, rename_control_tokens
from rayfuse.models.tokenizer import load_tokenizer

Role = Literal["system", "user", "assistant"]

SPECIAL_VARIABLES = tuple(
    f"{role}_token" for role in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
)
"""Keys of tokenizer_config.json and special_tokens_map.json that templates read as variables."""

PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")
"""What stands for message number N: characters for private use, which no template treats."""

RESERVED = re.compile("[\ue000-\ue003]")
"""Characters of placeholders and of the names of control tokens: messages cannot hold them."""

MAX_END_TOKENS = 3
"""The most tokens between an answer and the end of its turn, that one included."""

FORMAT_VERSION = 1
"""Increased when the same template gives other tokens."""

PROBE_ANSWER = "a"
"""Any answer: what stands before it is the prompt of all."""

SYSTEM_BREAK = "\n\n"
"""Between a system message and the user's first message, for templates without system messages."""


class ChatError(ValueError):
    """A conversation that a model's template or tokenizer cannot represent."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str
    context: str = ""
    """What an answer begins with that is not learned, such as its thoughts; precedes `content`."""
    is_cut: bool = False
    """The end of the answer is missing: nothing follows it, and no end of turn."""

    @property
    def text(self) -> str:
        """All that the template is given."""
        return self.context + self.content


@dataclass(frozen=True)
class ChatTokens:
    """A conversation in a model's tokens."""

    ids: Int[np.ndarray, " tokens"]
    answers: Int[np.ndarray, "answers 3"]
    """Of each answer: its first token, the one after its last, and the one after the end of its
    turn; the last two are equal where the end of the turn is no control token."""


@dataclass(frozen=True)
class ChatFormat:
    """A chat template with the tokenizer of its model."""

    template: str = field(repr=False)
    tokenizer: TextTokenizer
    special_tokens: dict[str, str] = field(repr=False)
    """Variables of the template, such as `bos_token`."""
    backend: Tokenizer = field(repr=False)
    """The tokenizer's, reading control tokens by names that no message has."""
    takes_system: bool = True
    """Whether there may be a system message; else it is put before the user's first message."""
    end_id: int | None = None
    """The control token that ends an answer."""

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[ChatTokens | ChatError]:
        """Encode conversations; for those that cannot be used, return the fault."""
        texts: list[str] = []
        spans: list[list[tuple[int, int]] | ChatError] = []
        for messages in conversations:
            try:
                text, found = self._render(messages)
            except ChatError as fault:
                text, found = "", fault
            texts.append(text)
            spans.append(found)
        with user_error_from(_explain_failure):
            encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        results: list[ChatTokens | ChatError] = []
        for text, found, encoding in zip(texts, spans, encodings, strict=True):
            if isinstance(found, ChatError):
                results.append(found)
                continue
            try:
                results.append(self._place(text, found, encoding))
            except ChatError as fault:
                results.append(fault)
        return results

    def encode_one(self, messages: Sequence[Message]) -> ChatTokens:
        """Encode one conversation.

        Raises:
            ChatError: The template or the tokenizer cannot represent it.
        """
        (result,) = self.encode([messages])
        if isinstance(result, ChatError):
            raise result
        return result

    def encode_prompt(self, messages: Sequence[Message]) -> Int[np.ndarray, " tokens"]:
        """Encode a conversation up to the token after which the model answers.

        In `encode`, the same tokens precede every answer to these messages; a space that the
        tokenizer may join with the first token of an answer can follow them.

        Raises:
            ChatError: The template or the tokenizer cannot represent it.
        """
        probe = self.encode_one([*messages, Message("assistant", PROBE_ANSWER)])
        return probe.ids[: probe.answers[-1, 0]]

    def _render(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """Render messages, control tokens by their hidden names, and find the answers.

        Raises:
            ChatError: The template refuses or changes the messages.
        """
        if not self.takes_system:
            messages = merge_system(messages)
        marked = [
            {"role": message.role, "content": f"\ue000{number}\ue001"}
            for number, message in enumerate(messages)
        ]
        plain = [{"role": message.role, "content": message.text} for message in messages]
        if any(RESERVED.search(message.text) for message in messages):
            raise ChatError("a message holds characters for private use, U+E000 to U+E003")
        pieces = PLACEHOLDER.split(self._run_template(marked))
        numbers = [int(number) for number in pieces[1::2]]
        if numbers != list(range(len(messages))):
            raise ChatError(_explain_order(numbers, len(messages)))
        parts = pieces[::2]
        expected = "".join(
            part + message.text for part, message in zip(parts[:-1], messages, strict=True)
        )
        if self._run_template(plain) != expected + parts[-1]:
            raise ChatError(
                "its template changes the text of a message (if it moves or drops thoughts, set "
                "thinking: drop)"
            )
        return self._join(messages, parts)

    def _join(
        self, messages: Sequence[Message], parts: list[str]
    ) -> tuple[str, list[tuple[int, int]]]:
        text, spans = "", []
        for part, message in zip(parts[:-1], messages, strict=True):
            text += self._hide(part) + message.context
            if message.role == "assistant":
                spans.append((len(text), len(text) + len(message.content)))
            text += message.content
        if not messages[-1].is_cut:
            text += self._hide(parts[-1])
        return text, spans

    def _hide(self, part: str) -> str:
        """Write control tokens of the template by the names that no other text has."""
        pattern = _compile_names(self.tokenizer.control_names)
        return pattern.sub(lambda match: _name_control_token(match.group()), part)

    def _run_template(self, messages: list[dict[str, str]]) -> str:
        try:
            return compile_template(self.template).render(
                messages=messages,
                tools=None,  # defined, as in `transformers`: templates ask whether it is none
                documents=None,
                add_generation_prompt=False,
                date_string=FIXED_DATE.strftime("%d %b %Y"),
                **self.special_tokens,
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise ChatError(f"its template refuses: {first_line(error)}") from error

    def _place(self, text: str, spans: list[tuple[int, int]], encoding: Any) -> ChatTokens:
        """Find the tokens of each answer, which must spell it and nothing else.

        Raises:
            ChatError: They spell other text, as the tokenizer joins an answer with what is around
                it, or changes its text.
        """
        ids = np.array(encoding.ids, dtype=np.int32)
        chars = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        answers = np.zeros((len(spans), 3), dtype=np.int64)
        for number, (begin, end) in enumerate(spans):
            start = int(np.searchsorted(chars[:, 1], begin, side="right"))
            stop = int(np.searchsorted(chars[:, 0], end, side="left"))
            spelled = b"".join(self.tokenizer.token_bytes[i] or b"" for i in ids[start:stop])
            answer = text[begin:end].encode()
            if start == 0 or spelled not in (answer, b" " + answer):
                raise ChatError(
                    f"the tokens of answer {number + 1} spell other text than the answer: its "
                    "tokenizer joins it with the template, or changes its text"
                )
            answers[number] = start, stop, self._find_end(ids, stop)
        return ChatTokens(ids, answers)

    def _find_end(self, ids: Int[np.ndarray, " tokens"], stop: int) -> int:
        """Find the token after the end of the turn; `stop` if it does not follow the answer."""
        for at, token_id in enumerate(ids[stop : stop + MAX_END_TOKENS].tolist(), stop):
            if token_id == self.end_id:
                return at + 1
            if not (self.tokenizer.token_bytes[token_id] or b"").isspace():
                break
        return stop


def _explain_failure(error: BaseException) -> UserError:
    return UserError(
        f"the tokenizer fails on a conversation ({first_line(error)}); its tokenizer.json may be "
        "corrupt: download it again"
    )


def merge_system(messages: Sequence[Message]) -> Sequence[Message]:
    """Put a system message before the user's first message, for templates that have none."""
    if len(messages) < 2 or messages[0].role != "system" or messages[1].role != "user":
        return messages
    system, first, *rest = messages
    return [replace(first, content=system.content + SYSTEM_BREAK + first.content), *rest]


def _name_control_token(name: str) -> str:
    """Choose the name of a control token in rendered text."""
    return f"\ue002{name}\ue003"


@lru_cache(maxsize=16)
def _compile_names(names: frozenset[str]) -> re.Pattern[str]:
    """Compile what matches names of control tokens, the longest first."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _explain_order(numbers: list[int], num_messages: int) -> str:
    """Explain that the template does not write every message one time, in order."""
    missing = sorted(set(range(num_messages)) - set(numbers))
    if missing:
        return f"its template omits message {missing[0] + 1}"
    return "its template repeats messages or changes their order"


def load_chat_format(settings: ModelSettings) -> ChatFormat:
    """Load the chat template of a recipe's model; that of a model made from the target is its own.

    Raises:
        UserError: The model has no template and the recipe names none, it cannot be read, or it
            cannot represent a question and its answer.
    """
    if isinstance(settings, TrainedSettings):
        settings = settings.target
    return _load(
        settings.model, settings.revision, settings.trust_remote_code, settings.chat_template
    )


def identify_format(settings: ModelSettings, *, is_chat: bool) -> str:
    """Identify how a model's tokens are made, for fingerprints.

    Args:
        settings: The model.
        is_chat: Texts are conversations, so that the chat template counts.

    Raises:
        UserError: As for `load_chat_format` and `load_tokenizer`.
    """
    if not is_chat:
        return load_recipe_tokenizer(settings).content_hash
    chat = load_chat_format(settings)
    parts = [chat.tokenizer.content_hash, chat.template, chat.special_tokens, FORMAT_VERSION]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=16)
def _load(
    model: str, revision: str | None, trust_remote_code: bool, chat_template: str | None
) -> ChatFormat:
    tokenizer = load_tokenizer(model, revision, trust_remote_code)
    folder = find_folder(model, revision, TOKENIZER_FILES)
    config = read_config(folder)
    special = {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in config.items()
        if name in SPECIAL_VARIABLES and token
    }
    template = read_template(folder, config, chat_template, model)
    plain = ChatFormat(template, tokenizer, special, _build_backend(tokenizer))
    return _try_out(plain, model)


def _build_backend(tokenizer: TextTokenizer) -> Tokenizer:
    """Build a tokenizer that reads control tokens, each by a name that no message has."""
    content = json.loads(tokenizer.backend.to_str())
    names = {name: _name_control_token(name) for name in tokenizer.control_names}
    names |= {hide_name(name): own for name, own in names.items()}  # where text could make them
    content = rename_control_tokens(content, names)
    backend = Tokenizer.from_str(json.dumps(content))
    backend.encode_special_tokens = False
    return backend


def _try_out(plain: ChatFormat, model: str) -> ChatFormat:
    """Find out whether a template takes system messages, and what ends an answer.

    Raises:
        UserError: It cannot represent a question and its answer.
    """
    question, answer = Message("user", "Why?"), Message("assistant", "Because.")
    try:
        tokens = plain.encode_one([question, answer])
    except ChatError as fault:
        raise UserError(
            f"the chat template of model {model!r} cannot be used: {fault}; set chat_template to a "
            "file with another one"
        ) from fault
    after = tokens.ids[tokens.answers[0, 1] :].tolist()
    end_id = next((i for i in after if plain.tokenizer.token_bytes[i] == b""), None)
    form = replace(plain, end_id=end_id)
    try:
        form.encode_one([Message("system", "Be brief."), question, answer])
    except ChatError:
        return replace(form, takes_system=False)
    return form
