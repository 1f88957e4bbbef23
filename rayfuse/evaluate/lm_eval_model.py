"""A model as lm-eval asks it: text only ever text, and the start token before it, as in training.

lm-eval's own wrapper of Hugging Face models reads control tokens out of the text, and puts a start
token before a prompt only where the tokenizer's post-processor does (Llama's, not GPT-2's): what it
measures is not what was trained and not what bits per byte measure. How context and continuation
are cut apart is lm-eval's, so that tasks mean what they mean elsewhere.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int
from lm_eval.api.model import LM, TemplateLM
from transformers import StoppingCriteria, StoppingCriteriaList

from rayfuse.evaluate.bits_per_byte import score_last, score_tokens, sum_rows
from rayfuse.evaluate.ensemble import TokenNLL, average_sources
from rayfuse.models.batching import batch_by_tokens
from rayfuse.models.causal_lm import CausalLM
from rayfuse.models.tokenizer import TextTokenizer

LIMITLESS_TOKENS = 2**31
"""The context of a model whose config names none."""


class TextLM(TemplateLM):
    """One model, for tasks of every kind."""

    def __init__(
        self,
        lm: CausalLM,
        tokenizer: TextTokenizer,
        *,
        batch_tokens: int,
        context_tokens: int | None = None,
    ) -> None:
        """Take a model that is loaded.

        Args:
            lm: The model.
            tokenizer: Its own.
            batch_tokens: Tokens of one forward pass, padding counted.
            context_tokens: The most tokens that the model takes.

        Raises:
            ValueError: It has no start token.
        """
        super().__init__()
        if tokenizer.start_id is None:
            raise ValueError("a model with neither BOS nor EOS cannot be asked tasks; name one")
        self.lm, self.text_tokenizer, self.start_id = lm, tokenizer, tokenizer.start_id
        self.batch_tokens, self.context_tokens = batch_tokens, context_tokens
        self.costs: list[TokenNLL] = []
        """Of every continuation that was scored, in the order they were asked."""

    @property
    def eot_token_id(self) -> int:
        """The start token, which lm-eval puts before a text without context."""
        return self.start_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        """Return the tokens of a text, without start token."""
        return self.text_tokenizer.encode([string])[0].tolist()

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: object,
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability, and whether each token is the likeliest.

        Of a context that does not fit, the end is kept, with the start token before it.
        """
        rows: list[np.ndarray] = []
        for _, context, continuation in requests:
            text = context if context[:1] != [self.start_id] else context[1:]
            room = (self.context_tokens or LIMITLESS_TOKENS) - 1 - len(continuation)
            if room < 0:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens does not fit the model's "
                    f"{self.context_tokens}"
                )
            rows.append(np.array([self.start_id, *text[max(len(text) - room, 0) :], *continuation]))
        counts = [len(continuation) for _, _, continuation in requests]
        answers: dict[int, tuple[float, bool]] = {}
        costs: dict[int, TokenNLL] = {}
        for batch in batch_by_tokens([len(row) for row in rows], self.batch_tokens):
            scored = score_last(self.lm, [rows[i] for i in batch], [counts[i] for i in batch])
            for i, (logprobs, is_greedy) in zip(batch, scored, strict=True):
                answers[i] = float(logprobs.sum()), is_greedy
                costs[i] = TokenNLL(self._find_ends(requests[i][0][1], requests[i][2]), -logprobs)
        self.costs += [costs[i] for i in range(len(requests))]
        return [answers[i] for i in range(len(requests))]

    def _find_ends(self, continuation: str, tokens: list[int]) -> Int[np.ndarray, " tokens"]:
        """Return where tokens end in a continuation's bytes.

        Told from its end: the first may spell a blank that lm-eval has moved from the context.
        """
        lengths = np.array([len(self.text_tokenizer.token_bytes[i] or b"") for i in tokens])
        after = lengths[::-1].cumsum()[::-1] - lengths
        return np.maximum(len(continuation.encode()) - after, 0)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of each whole text, as for bits per byte."""
        texts = [str(request.args[0]) for request in requests]
        rows = pa.table({"row_id": [f"text {i}" for i in range(len(texts))], "text": texts})
        costs = score_tokens(
            self.lm,
            self.text_tokenizer,
            rows,
            name="of this task",
            batch_tokens=self.batch_tokens,
            context_tokens=self.context_tokens,
        )
        self.costs += costs
        return (-sum_rows(costs)).tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context, up to the first stop or its own end."""
        answers: dict[int, str] = {}
        prompts = [self._cut_prompt(*request.args) for request in requests]
        lengths = [len(prompt) + _new_tokens(request.args[1])
                   for prompt, request in zip(prompts, requests, strict=True)]  # fmt: skip
        for batch in batch_by_tokens(lengths, self.batch_tokens):
            for part in _split_by_settings(batch, requests):
                written = self._generate([prompts[i] for i in part], requests[part[0]].args[1])
                answers |= dict(zip(part, written, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _cut_prompt(self, context: str, settings: dict[str, Any]) -> list[int]:
        room = (self.context_tokens or LIMITLESS_TOKENS) - 1 - _new_tokens(settings)
        if room < 1:
            raise ValueError(
                f"a task wants {_new_tokens(settings)} new tokens, which leaves no room in the "
                f"model's {self.context_tokens}; lower max_gen_toks in its definition"
            )
        tokens = self.tok_encode(context)
        return [self.start_id, *tokens[max(len(tokens) - room, 0) :]]

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], settings: dict[str, Any]) -> list[str]:
        width = max(len(prompt) for prompt in prompts)
        ids = torch.zeros((len(prompts), width), dtype=torch.int64)
        is_text = torch.zeros((len(prompts), width), dtype=torch.int64)
        for row, prompt in enumerate(prompts):  # padded on the left: all go on at the same place
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            is_text[row, width - len(prompt) :] = 1
        stops = _list_stops(settings)
        torch.manual_seed(0)
        eos_id = self.text_tokenizer.eos_id
        model: Any = self.lm.model
        written = model.generate(
            input_ids=ids.to(self.lm.device),
            attention_mask=is_text.to(self.lm.device),
            max_new_tokens=_new_tokens(settings),
            eos_token_id=eos_id,
            pad_token_id=0 if eos_id is None else eos_id,
            stopping_criteria=StoppingCriteriaList([_Stops(stops, self.text_tokenizer, width)]),
            **_sampling(settings),
        )
        return [_cut_at(self._spell(row[width:].tolist()), stops) for row in written]

    def _spell(self, tokens: list[int]) -> str:
        """Return the text of tokens up to EOS; bytes that are no whole character are replaced."""
        if self.text_tokenizer.eos_id in tokens:
            tokens = tokens[: tokens.index(self.text_tokenizer.eos_id)]
        return _join_bytes(tokens, self.text_tokenizer).decode(errors="replace")


class EnsembleLM(LM):
    """The mean of models that have been asked the same, from what each paid token by token."""

    def __init__(self, sources: Sequence[Sequence[TokenNLL]]) -> None:
        """Take the sources' costs, all in the order they were asked."""
        super().__init__()
        self.rows = [average_sources(row) for row in zip(*sources, strict=True)]

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability; which is likeliest cannot be told."""
        return [(logprob, False) for logprob in self.loglikelihood_rolling(requests)]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return each text's log-probability."""
        assert len(requests) == len(self.rows), "the sources were asked the same"
        return [-float(row.nats.sum()) for row in self.rows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Refuse: sources with other tokens cannot write one text together."""
        raise NotImplementedError("the ensemble writes no text")


class _Stops(StoppingCriteria):
    """Ends a row as soon as it holds one of the stop texts."""

    def __init__(self, stops: list[str], tokenizer: TextTokenizer, width: int) -> None:
        self.stops = [stop.encode() for stop in stops]
        self.tokenizer, self.width = tokenizer, width
        self.tail = max(map(len, self.stops), default=0) + 1

    def __call__(self, input_ids: Any, scores: Any, **kwargs: object) -> Any:
        # Each token spells a byte or more, so the end of a row that matters is short.
        ends = input_ids[:, max(self.width, input_ids.shape[1] - self.tail) :].tolist()
        texts = [_join_bytes(end, self.tokenizer) for end in ends]
        done = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def _join_bytes(tokens: Sequence[int], tokenizer: TextTokenizer) -> bytes:
    size = tokenizer.vocab_size  # a head may be wider
    return b"".join(tokenizer.token_bytes[i] or b"" for i in tokens if i < size)


def _cut_at(text: str, stops: Sequence[str]) -> str:
    return text[: min([at for stop in stops if (at := text.find(stop)) >= 0], default=len(text))]


def _list_stops(settings: dict[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def _new_tokens(settings: dict[str, Any]) -> int:
    names = ("max_gen_toks", "max_new_tokens")
    return int(next((settings[name] for name in names if name in settings), 256))


def _sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a task says of drawing tokens; without it the likeliest is taken."""
    if not settings.get("do_sample") or settings.get("temperature") == 0:
        return {"do_sample": False}
    names = ("temperature", "top_p", "top_k")
    return {"do_sample": True} | {name: settings[name] for name in names if name in settings}


def _split_by_settings(batch: list[int], requests: Sequence[Any]) -> list[list[int]]:
    """Return a batch in parts whose requests are to be answered in the same way."""
    parts: dict[str, list[int]] = {}
    for i in batch:
        parts.setdefault(repr(sorted(requests[i].args[1].items())), []).append(i)
    return list(parts.values())
