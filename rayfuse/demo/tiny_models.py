"""Train a tiny LLM and its tokenizer from scratch."""

from collections.abc import Callable, Sequence
from math import cos, pi
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch.nn.functional import cross_entropy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from rayfuse.demo.specs import ModelSpec
from rayfuse.demo.text import DOMAINS, Document
from rayfuse.demo.tiny_tokenizers import save_tokenizer, train_tokenizer
from rayfuse.models.tokenizer import TextTokenizer, load_tokenizer

OnStep = Callable[[int, int, float], None]
"""Called with the completed steps, all steps, and the loss in nats per token."""

TOKENIZER_BYTES = 400_000
"""Bytes of text that merges are counted on. 4 times as much gave 2 % fewer tokens of prose and 1 %
fewer of code."""


def ignore_step(step: int, steps: int, loss: float) -> None:
    """Ignore a step: the default of `on_step`."""


def pretrain(
    spec: ModelSpec,
    documents: Sequence[Document],
    folder: Path,
    *,
    seed: int,
    on_step: OnStep = ignore_step,
) -> None:
    """Train a tokenizer and a model from scratch, and save both as a Hugging Face folder.

    The same seed gives the same weights on the same machine with the same number of threads.

    Args:
        spec: What to train.
        documents: Documents of every domain that the spec names.
        folder: Output folder, created if missing.
        seed: Seed of the initial weights and the order.
        on_step: Called after every step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(
        train_tokenizer(spec.tokenizer, _sample_texts(documents), spec.vocab_size), folder
    )
    load_tokenizer.cache_clear()  # the folder may have held another
    tokenizer = load_tokenizer(str(folder))
    rows = draw_rows(spec, documents, tokenizer, seed)
    model = build_model(spec, tokenizer, seed)
    train_model(model, rows, spec, on_step)
    model.save_pretrained(folder)


def draw_rows(
    spec: ModelSpec, documents: Sequence[Document], tokenizer: TextTokenizer, seed: int
) -> Int[torch.Tensor, "rows seq_len"]:
    """Build all rows of a training run in training order, with each domain's share.

    A domain's documents, each with start token and EOS, are concatenated and split into rows. Every
    row begins with the start token, as the rows do that rayfuse scores.
    """
    num_rows = spec.steps * spec.rows_per_step
    parts: list[np.ndarray] = []
    for domain, share in spec.shares:
        texts = [document.text for document in documents if document.domain == domain]
        wanted = round(num_rows * share)
        piece_tokens = spec.context_tokens - 1
        stream = _stream_ids(texts, tokenizer, wanted * piece_tokens, seed)
        pieces = stream.reshape(wanted, piece_tokens)
        starts = np.full((wanted, 1), tokenizer.start_id)
        parts.append(np.concatenate([starts, pieces], axis=1))
    rows = np.concatenate(parts).astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(rows))
    return torch.from_numpy(rows[order])


def _stream_ids(
    texts: Sequence[str], tokenizer: TextTokenizer, num_tokens: int, seed: int
) -> Int[np.ndarray, " tokens"]:
    """Concatenate documents in random order until they have enough tokens.

    All documents are used once, in a new order, before any is repeated.
    """
    random = Random(seed)
    parts: list[np.ndarray] = []
    found = 0
    while found < num_tokens:
        shuffled = random.sample(texts, len(texts))
        for start in range(0, len(shuffled), 64):
            batch = shuffled[start : start + 64]
            parts += tokenizer.encode_rows(batch, [True] * len(batch))
            found = sum(map(len, parts))
            if found >= num_tokens:
                break
    return np.concatenate(parts)[:num_tokens]


def build_model(spec: ModelSpec, tokenizer: TextTokenizer, seed: int) -> Any:
    """Build an untrained model of a spec's family and size."""
    torch.manual_seed(seed)
    ids = {"bos_token_id": tokenizer.start_id, "eos_token_id": tokenizer.eos_id}
    # The usual 0.02 suits widths in the thousands: after 200 steps at width 128 it was 0.2 bits per
    # byte behind 1 / sqrt(width) on average over the four families.
    shared = {"vocab_size": spec.head_width, "initializer_range": spec.width**-0.5, **ids}
    if spec.is_tied:  # else each family's default
        shared["tie_word_embeddings"] = True
    return BUILDERS[spec.family](spec, shared)


def _build_llama(spec: ModelSpec, shared: dict[str, Any]) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            **shared,
            hidden_size=spec.width,
            intermediate_size=8 * spec.width // 3 // 32 * 32,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.width // spec.head_size,
            max_position_embeddings=spec.context_tokens,
        )
    )


def _build_neox(spec: ModelSpec, shared: dict[str, Any]) -> Any:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            **shared,
            hidden_size=spec.width,
            intermediate_size=4 * spec.width,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.width // spec.head_size,
            max_position_embeddings=spec.context_tokens,
        )
    )


def _build_mpt(spec: ModelSpec, shared: dict[str, Any]) -> Any:
    return MptForCausalLM(
        MptConfig(
            **shared,
            d_model=spec.width,
            n_layers=spec.layers,
            n_heads=spec.width // spec.head_size,
            max_seq_len=spec.context_tokens,
        )
    )


def _build_gpt2(spec: ModelSpec, shared: dict[str, Any]) -> Any:
    return GPT2LMHeadModel(
        GPT2Config(
            **shared,
            n_embd=spec.width,
            n_layer=spec.layers,
            n_head=spec.width // spec.head_size,
            n_positions=spec.context_tokens,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


BUILDERS: dict[str, Callable[[ModelSpec, dict[str, Any]], Any]] = {
    "llama": _build_llama,
    "neox": _build_neox,
    "mpt": _build_mpt,
    "gpt2": _build_gpt2,
}


def train_model(
    model: Any, rows: Int[torch.Tensor, "rows seq_len"], spec: ModelSpec, on_step: OnStep
) -> None:
    """Train a model in place on rows in their order, each seen once."""
    # float32: bfloat16 autocast is 0.7 times as fast at these sizes on a CPU with AVX512-BF16.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=spec.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _learning_rate_share(step, spec.steps)
    )
    model.train()
    for step, batch in enumerate(rows.split(spec.rows_per_step), 1):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        on_step(step, spec.steps, float(loss.detach()))


def _learning_rate_share(step: int, steps: int) -> float:
    """Compute the learning rate as a share of the peak: linear warm-up, then cosine decay."""
    warmup = max(1, steps // 20)
    return min((step + 1) / warmup, (1 + cos(pi * step / steps)) / 2)


def _sample_texts(documents: Sequence[Document]) -> list[str]:
    """Sample the text that merges are counted on, the same amount of each domain.

    A tokenizer is trained on all domains whatever its model is trained on, as with real models.
    """
    texts: list[str] = []
    for domain in DOMAINS:
        chars_left = TOKENIZER_BYTES // len(DOMAINS)
        for document in documents:
            if document.domain == domain and chars_left > 0:
                texts.append(document.text)
                chars_left -= len(document.text)
    return texts
