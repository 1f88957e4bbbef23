"""Models behind lm-eval's `LM` interface, tokenized as in training and in bits per byte.

lm-eval's own wrapper of Hugging Face models parses control tokens in the text, and adds a start
token only where the tokenizer's post-processor does (Llama's, not GPT-2's). Here a text never
yields a control token and always follows a start token, as in training. Context and continuation
are separated by lm-eval's own code, so that scores are comparable with those published.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int
from lm_eval.api.model import LM, TemplateLM
from transformers import StoppingCriteria, StoppingCriteriaList

from rayfuse.config.base import UserError
from rayfuse.evaluate.bits_per_byte import score_last, score_tokens, sum_rows
from rayfuse.evaluate.ensemble import TokenNLL, average_sources
from rayfuse.models.batching import batch_by_tokens, is_same_side
from rayfuse.models.causal_lm import CausalLM
from rayfuse.models.chat import ChatError, ChatFormat, Message
from rayfuse.models.tokenizer import TextTokenizer

UNLIMITED_TOKENS = 2**31
"""The context length of a model that has none in its config."""

DEFAULT_NEW_TOKENS = 256
"""Length of a generation where the task does not limit it: lm-eval's own default."""


class TextLM(TemplateLM):
    """One model, for tasks of every kind."""

    def __init__(
        self,
        lm: CausalLM,
        tokenizer: TextTokenizer,
        *,
        batch_tokens: int,
        context_tokens: int | None = None,
        chat: ChatFormat | None = None,
    ) -> None:
        """Wrap a loaded model.

        Args:
            lm: The model.
            tokenizer: The model's own tokenizer.
            batch_tokens: Tokens of one forward pass, padding included.
            context_tokens: The model's context length.
            chat: The model's chat template, by which it is asked to generate; None for plain text.

        Raises:
            UserError: The model has no start token.
        """
        super().__init__()
        if tokenizer.start_id is None:
            raise UserError(
                "a model with neither BOS nor EOS cannot run tasks; name one of them in its "
                "tokenizer_config.json"
            )
        self.lm, self.text_tokenizer, self.start_id = lm, tokenizer, tokenizer.start_id
        self.batch_tokens, self.context_tokens, self.chat = batch_tokens, context_tokens, chat
        self.end_ids = [tokenizer.eos_id, None if chat is None else chat.end_id]
        """Tokens that end a generated text."""
        self.token_nll: list[TokenNLL] = []
        """NLL of every scored continuation, in the order of the requests."""

    @property
    def eot_token_id(self) -> int:
        """The start token: lm-eval puts this one before a text without context."""
        return self.start_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        """Tokenize a text, without a start token."""
        return self.text_tokenizer.encode([string])[0].tolist()

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: object,
    ) -> list[tuple[float, bool]]:
        """Compute each continuation's log-probability, and whether all its tokens are the argmax.

        A context that does not fit is truncated at its start, after the start token.
        """
        rows = [self._join_tokens(context, continuation) for _, context, continuation in requests]
        counts = [len(continuation) for _, _, continuation in requests]
        answers: dict[int, tuple[float, bool]] = {}
        token_nll: dict[int, TokenNLL] = {}
        lengths, boundaries = [len(row) for row in rows], self.lm.length_boundaries
        for batch in batch_by_tokens(lengths, self.batch_tokens, boundaries):
            scored = score_last(self.lm, [rows[i] for i in batch], [counts[i] for i in batch])
            for i, (logprobs, is_greedy) in zip(batch, scored, strict=True):
                answers[i] = float(logprobs.sum()), is_greedy
                ends = self._find_ends(requests[i][0][1], requests[i][2])
                token_nll[i] = TokenNLL(ends, -logprobs)
        self.token_nll += [token_nll[i] for i in range(len(requests))]
        return [answers[i] for i in range(len(requests))]

    def _join_tokens(self, context: list[int], continuation: list[int]) -> Int[np.ndarray, " _"]:
        text = context if context[:1] != [self.start_id] else context[1:]
        room = (self.context_tokens or UNLIMITED_TOKENS) - 1 - len(continuation)
        if room < 0:
            raise UserError(
                f"a continuation of {len(continuation)} tokens does not fit into the model's "
                f"context of {self.context_tokens} tokens; remove the task"
            )
        return np.array([self.start_id, *text[max(len(text) - room, 0) :], *continuation])

    def _find_ends(self, continuation: str, tokens: list[int]) -> Int[np.ndarray, " tokens"]:
        """Find where tokens end in a continuation's bytes.

        Counted from the continuation's end, because its first token may spell a space that lm-eval
        has moved there from the context.
        """
        lengths = np.array([len(self.text_tokenizer.token_bytes[i] or b"") for i in tokens])
        after = lengths[::-1].cumsum()[::-1] - lengths
        return np.maximum(len(continuation.encode()) - after, 0)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Compute the log-probability of each text without a context, as for bits per byte."""
        texts = [str(request.args[0]) for request in requests]
        rows = pa.table({"row_id": [f"text {i}" for i in range(len(texts))], "text": texts})
        token_nll = score_tokens(
            self.lm,
            self.text_tokenizer,
            rows,
            name="of this task",
            batch_tokens=self.batch_tokens,
            context_tokens=self.context_tokens,
        )
        self.token_nll += token_nll
        return (-sum_rows(token_nll)).tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate a continuation of each context, up to the first stop text or EOS.

        With a chat template, the context is the message of a user, and the continuation an answer.
        """
        answers: dict[int, str] = {}
        prompts = [self._truncate_prompt(*request.args) for request in requests]
        lengths = [
            len(prompt) + _count_new_tokens(request.args[1])
            for prompt, request in zip(prompts, requests, strict=True)
        ]
        for batch in batch_by_tokens(lengths, self.batch_tokens, self.lm.length_boundaries):
            for part in self._split_batch(batch, prompts, requests):
                written = self._generate([prompts[i] for i in part], requests[part[0]].args[1])
                answers |= dict(zip(part, written, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _split_batch(
        self, batch: list[int], prompts: list[list[int]], requests: Sequence[Any]
    ) -> list[list[int]]:
        """Split a batch into parts whose rows have the same settings and do not affect one another.

        Under LongRoPE the positions of all rows change when the longest row passes a boundary. A
        row that passes one while it is generated shares a part only with rows of its length.
        """
        parts: dict[tuple[str, int], list[int]] = {}
        for i in batch:
            settings, length = requests[i].args[1], len(prompts[i])
            end = length + _count_new_tokens(settings)
            passes = not is_same_side(length, end, self.lm.length_boundaries)
            key = repr(sorted(settings.items())), length if passes else 0
            parts.setdefault(key, []).append(i)
        return list(parts.values())

    def _truncate_prompt(self, context: str, settings: dict[str, Any]) -> list[int]:
        room = (self.context_tokens or UNLIMITED_TOKENS) - 1 - _count_new_tokens(settings)
        if room < 1:
            raise UserError(
                f"a task generates {_count_new_tokens(settings)} tokens, which leaves no room for "
                f"a prompt in the model's context of {self.context_tokens} tokens; lower "
                "max_gen_toks in its definition"
            )
        if self.chat is not None:
            return self._encode_message(self.chat, context, room + 1)
        tokens = self.tok_encode(context)
        return [self.start_id, *tokens[max(len(tokens) - room, 0) :]]

    def _encode_message(self, chat: ChatFormat, text: str, room: int) -> list[int]:
        """Encode a user's message, truncated at its start, in the chat template."""
        text = text.strip()  # as many templates do
        tokens, cut = self.tok_encode(text), 0
        try:
            prompt = chat.encode_prompt([Message("user", text)])
            while len(prompt) > room:
                cut += len(prompt) - room
                if cut >= len(tokens):
                    raise UserError(
                        f"the chat template leaves no room for a message in the {room} tokens of a "
                        "prompt; remove the task"
                    )
                kept = _join_bytes(tokens[cut:], self.text_tokenizer)
                prompt = chat.encode_prompt([Message("user", kept.decode(errors="ignore").strip())])
        except ChatError as error:
            raise UserError(
                f"the model cannot be asked a task in its chat template: {error}; remove the task"
            ) from error
        return prompt.tolist()

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], settings: dict[str, Any]) -> list[str]:
        width = max(len(prompt) for prompt in prompts)
        ids = torch.zeros((len(prompts), width), dtype=torch.int64)
        is_text = torch.zeros((len(prompts), width), dtype=torch.int64)
        for row, prompt in enumerate(prompts):  # padded on the left: generation starts at the end
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            is_text[row, width - len(prompt) :] = 1
        stops = _list_stops(settings)
        torch.manual_seed(0)
        end_ids = [token_id for token_id in self.end_ids if token_id is not None]
        model: Any = self.lm.model
        written = model.generate(
            input_ids=ids.to(self.lm.device),
            attention_mask=is_text.to(self.lm.device),
            max_new_tokens=_count_new_tokens(settings),
            eos_token_id=end_ids or None,
            pad_token_id=end_ids[0] if end_ids else 0,
            stopping_criteria=StoppingCriteriaList([_StopTexts(stops, self.text_tokenizer, width)]),
            **_read_sampling(settings),
        )
        return [_cut_at(self._decode(row[width:].tolist()), stops) for row in written]

    def _decode(self, tokens: list[int]) -> str:
        """Decode tokens up to EOS; bytes that are not valid UTF-8 are replaced.

        The space by which some tokenizers begin every text is no part of an answer.
        """
        ends = [at for at, token_id in enumerate(tokens) if token_id in self.end_ids]
        text = _join_bytes(tokens[: min(ends, default=len(tokens))], self.text_tokenizer)
        text = text if self.chat is None else text.removeprefix(b" ")
        return text.decode(errors="replace")


class EnsembleLM(LM):
    """The ensemble of models that scored the same requests, computed from their token NLL."""

    def __init__(self, sources: Sequence[Sequence[TokenNLL]]) -> None:
        """Average the sources' token NLL, each given in the order of the requests."""
        super().__init__()
        self.rows = [average_sources(row) for row in zip(*sources, strict=True)]

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Compute each continuation's log-probability; `is_greedy` is unknown, so False."""
        return [(logprob, False) for logprob in self.loglikelihood_rolling(requests)]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Compute each text's log-probability."""
        assert len(requests) == len(self.rows), "the sources scored other requests"
        return [-float(row.nats.sum()) for row in self.rows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Refuse: sources with different tokenizers cannot generate one text together."""
        raise NotImplementedError("the ensemble cannot generate text")


class _StopTexts(StoppingCriteria):
    """Ends a row as soon as it contains one of the stop texts."""

    def __init__(self, stops: list[str], tokenizer: TextTokenizer, width: int) -> None:
        self.stops = [stop.encode() for stop in stops]
        self.tokenizer, self.width = tokenizer, width
        self.num_tokens = max(map(len, self.stops), default=0) + 1

    def __call__(self, input_ids: Any, scores: Any, **kwargs: object) -> Any:
        # A new stop text ends in the newest token, and a token spells a byte or more, so looking at
        # the last few tokens finds it. Decoding the rows from their start would be quadratic.
        ends = input_ids[:, max(self.width, input_ids.shape[1] - self.num_tokens) :].tolist()
        texts = [_join_bytes(end, self.tokenizer) for end in ends]
        done = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def _join_bytes(tokens: Sequence[int], tokenizer: TextTokenizer) -> bytes:
    size = tokenizer.vocab_size  # the head may have more rows than the vocabulary
    return b"".join(tokenizer.token_bytes[i] or b"" for i in tokens if i < size)


def _cut_at(text: str, stops: Sequence[str]) -> str:
    return text[: min([at for stop in stops if (at := text.find(stop)) >= 0], default=len(text))]


def _list_stops(settings: dict[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def _count_new_tokens(settings: dict[str, Any]) -> int:
    names = ("max_gen_toks", "max_new_tokens")
    return int(next((settings[name] for name in names if name in settings), DEFAULT_NEW_TOKENS))


def _read_sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """Translate a task's sampling settings; the default is greedy decoding."""
    if not settings.get("do_sample") or settings.get("temperature") == 0:
        return {"do_sample": False}
    names = ("temperature", "top_p", "top_k")
    return {"do_sample": True} | {name: settings[name] for name in names if name in settings}
