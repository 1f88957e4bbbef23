"""Tiny random models for the hub ids of recipes: same architecture, same kind of tokenizer."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM

from rayfuse.models.tokenizer import load_tokenizer
from tests.fakes import byte_level_tokenizer, save_model, save_tokenizer, sentencepiece_tokenizer
from tests.imports.stores import write_distillkit

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
TOKENS = 330
"""Entries of a vocabulary, at least: bytes, control tokens, and some words."""


def split_digits(texts: list[str], size: int) -> Tokenizer:
    """Train a byte-level tokenizer in which each digit is a token, as in SmolLM2."""
    tokenizer = byte_level_tokenizer(size, texts)
    digits, rest = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    return tokenizer


def split_by(pattern: str) -> Callable[[list[str], int], Tokenizer]:
    """Return a maker of byte-level tokenizers that split text by a pattern of their own."""

    def train(texts: list[str], size: int) -> Tokenizer:
        tokenizer = byte_level_tokenizer(size, texts)
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, rest])
        return tokenizer

    return train


def gpt_neox(texts: list[str], size: int) -> Tokenizer:
    """Train a byte-level tokenizer as GPT-2's, which MPT has."""
    return byte_level_tokenizer(size, texts)


def llama(texts: list[str], size: int) -> Tokenizer:
    """Train a SentencePiece-like tokenizer, with a prefix space and byte fallback."""
    return sentencepiece_tokenizer(size, texts)


def gemma(texts: list[str], size: int) -> Tokenizer:
    """Train a SentencePiece-like tokenizer without a prefix space."""
    tokenizer = sentencepiece_tokenizer(size, texts)
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


@dataclass(frozen=True)
class StandIn:
    """What a tiny model has in common with one of the hub."""

    family: str
    """Its model_type."""
    train: Callable[[list[str], int], Tokenizer]
    bos: str | None = "<|end|>"
    eos: str = "<|end|>"
    tied: bool = True


SENTENCEPIECE: dict[str, Any] = {"bos": "<s>", "eos": "</s>"}
STAND_INS: Mapping[str, StandIn] = {
    "HuggingFaceTB/SmolLM2-135M": StandIn("llama", split_digits),
    "HuggingFaceTB/SmolLM2-135M-Instruct": StandIn("llama", split_digits),
    "HuggingFaceTB/SmolLM2-360M": StandIn("llama", split_digits),
    "HuggingFaceTB/SmolLM2-1.7B": StandIn("llama", split_digits),
    "Qwen/Qwen2.5-0.5B": StandIn("qwen2", split_by(QWEN), bos=None),
    "Qwen/Qwen2.5-0.5B-Instruct": StandIn("qwen2", split_by(QWEN), bos=None),
    "Qwen/Qwen2.5-1.5B": StandIn("qwen2", split_by(QWEN), bos=None),
    "Qwen/Qwen2.5-Coder-1.5B": StandIn("qwen2", split_by(QWEN), bos=None),
    "Qwen/Qwen2.5-7B": StandIn("qwen2", split_by(QWEN), bos=None, tied=False),
    "allenai/OLMo-2-1124-7B": StandIn("olmo2", split_by(QWEN), bos=None, tied=False),
    "bigcode/starcoder2-3b": StandIn("starcoder2", split_digits),
    "bigscience/bloom-560m": StandIn("bloom", split_by(BLOOM)),
    "google/gemma-3-270m": StandIn("gemma3_text", gemma, **SENTENCEPIECE),
    "google/gemma-3-1b-pt": StandIn("gemma3_text", gemma, **SENTENCEPIECE),
    "meta-llama/Llama-2-7b-hf": StandIn("llama", llama, tied=False, **SENTENCEPIECE),
    "meta-llama/Llama-3.1-70B": StandIn("llama", split_by(QWEN), tied=False),
    "mistralai/Mistral-7B-v0.1": StandIn("mistral", llama, tied=False, **SENTENCEPIECE),
    "mosaicml/mpt-7b": StandIn("mpt", gpt_neox, bos=None),
    "openlm-research/open_llama_7b_v2": StandIn("llama", llama, tied=False, **SENTENCEPIECE),
}


def save_stand_ins(ids: Sequence[str], texts: list[str], folder: Path) -> dict[str, str]:
    """Write a tiny model for each hub id, with vocabularies of different sizes; return folders."""
    folders: dict[str, str] = {}
    for number, hub_id in enumerate(dict.fromkeys(ids)):
        own, path = STAND_INS[hub_id], folder / hub_id.replace("/", "--")
        tokenizer = own.train(texts, TOKENS + 20 * number)
        save_model(own.family, tokenizer.get_vocab_size() + 8, path, tied=own.tied)
        save_tokenizer(tokenizer, path, bos=own.bos, eos=own.eos)
        folders[hub_id] = str(path)
    return folders


def write_store(model: Path, texts: list[str], folder: Path) -> None:
    """Write what a model predicts of texts as DistillKit stores it, then remove its weights."""
    tokenizer = load_tokenizer(str(model))
    lm = AutoModelForCausalLM.from_pretrained(model).eval()
    rows = [[tokenizer.start_id, *row.tolist()] for row in tokenizer.encode(texts)]
    with torch.inference_mode():
        logits = [lm(torch.tensor([row])).logits[0, :, : tokenizer.vocab_size] for row in rows]
    scored = [(row, part.numpy()) for row, part in zip(rows, logits, strict=True)]
    write_distillkit(folder, scored, vocab_size=tokenizer.vocab_size)
    for file in ("config.json", "model.safetensors"):
        (model / file).unlink()


def write_documents(path: Path, texts: list[str], field: str = "text") -> None:
    """Write texts as JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
