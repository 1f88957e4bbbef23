"""Tiny real models and tokenizers, made on the spot; workers of Ray can import this too."""

import resource
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.models.tiny_models import tiny_config


def children_seconds() -> float:
    """Return the processor time of all processes that ended: other load does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


SAMPLE = [
    "The cat sat on the mat, and the dog looked at the cat.\n",
    "def add(a, b):\n    return a + b\n\nprint(add(12, 30))\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 漢字 и буквы\n",
    "12 + 30 = 42, 7 * 6 = 42, 100 - 58 = 42. What is forty-two?\n",
]


def byte_level_tokenizer(vocab_size: int, texts: list[str] | None = None) -> Tokenizer:
    """Train a GPT-2-style tokenizer; `<|end|>` is its only special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts or SAMPLE, trainer)
    return tokenizer


def sentencepiece_tokenizer(
    vocab_size: int, texts: list[str] | None = None, *, splits_words: bool = False
) -> Tokenizer:
    """Train a Llama-style tokenizer: blanks as U+2581, one put before the text, byte fallback.

    With `splits_words`, as in real ones, a blank is nowhere but at a token's start.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False
    )
    if splits_words:
        tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    tokenizer.train_from_iterator(texts or SAMPLE, trainer)
    tokenizer.pre_tokenizer = None
    return _without_special_bytes(tokenizer)


def _without_special_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """Keep only the three control tokens as added tokens; byte tokens are plain entries."""
    import json

    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(content))


def line_tokenizer() -> Tokenizer:
    """Return a tokenizer that knows no word: each line is one unknown token."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[E]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, bos: str | None, eos: str) -> None:
    """Write a tokenizer as a Hugging Face folder."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos
    ).save_pretrained(folder)


def save_model(
    family: str, vocab_size: int, folder: Path, *, tied: bool = False, width: int = 32
) -> None:
    """Write a random tiny model of a family as a Hugging Face folder."""
    torch.manual_seed(len(family) + vocab_size)
    model = AutoModelForCausalLM.from_config(
        tiny_config(family, vocab_size, tied=tied, width=width)
    )
    model.save_pretrained(folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files beside a model."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)


def save_adapter(base: Path, folder: Path, **settings: Any) -> None:
    """Write a random LoRA adapter of a model as a folder of peft's."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    values = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | settings
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(**values, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:  # B starts at zero
                parameter.add_(torch.randn_like(parameter) / 4)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
