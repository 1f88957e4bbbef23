"""Train tokenizers of two kinds: SentencePiece as in Llama-2, byte-level as in GPT-NeoX and MPT."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rayfuse.models.token_bytes import SPACE_MARK

Kind = Literal["sentencepiece", "byte_level"]

END_OF_TEXT = "<|endoftext|>"
SENTENCEPIECE_SPECIALS = ("<unk>", "<s>", "</s>")

WORD_PATTERN = r"\d|_(?=\d)|_+(?=_)|_?[^\W\d]+|_?[^\w\s_]+".replace("_", SPACE_MARK)
"""Longest text of one SentencePiece token; digits stand alone, as in Llama-2."""


def train_tokenizer(kind: Kind, texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer of at most `vocab_size` entries, special tokens included.

    Args:
        kind: `sentencepiece`: a prefix space, bytes as `<0x0A>`; `byte_level`: GPT-2's.
        texts: Texts that merges are counted on.
        vocab_size: Above 300, so that every byte has a token.
    """
    train = _train_sentencepiece if kind == "sentencepiece" else _train_byte_level
    return train(texts, vocab_size)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that `AutoTokenizer` and rayfuse read."""
    start, end = special_tokens(tokenizer)
    wrapped: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=start, eos_token=end
    )
    wrapped.save_pretrained(folder)


def special_tokens(tokenizer: Tokenizer) -> tuple[str, str]:
    """Choose start token and EOS; byte-level models have one token for both."""
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        return SENTENCEPIECE_SPECIALS[1], SENTENCEPIECE_SPECIALS[2]
    return END_OF_TEXT, END_OF_TEXT


def _train_byte_level(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def _train_sentencepiece(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Count merges within words, then order the vocabulary as Llama-2: specials, bytes, rest."""
    counter = Tokenizer(models.BPE(unk_token="<unk>"))
    counter.normalizer = _mark_spaces()
    counter.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PATTERN), "removed", invert=True)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    counter.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(byte_tokens),
            special_tokens=list(SENTENCEPIECE_SPECIALS),
            limit_alphabet=100,
            show_progress=False,
        ),
    )
    counted = json.loads(counter.to_str())["model"]
    rest = sorted(counted["vocab"], key=counted["vocab"].__getitem__)
    tokens = [*SENTENCEPIECE_SPECIALS, *byte_tokens, *rest[len(SENTENCEPIECE_SPECIALS) :]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: token_id for token_id, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in counted["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = _mark_spaces()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE_MARK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(list(SENTENCEPIECE_SPECIALS))
    return tokenizer


def _mark_spaces() -> normalizers.Normalizer:
    return normalizers.Sequence(
        [normalizers.Prepend(SPACE_MARK), normalizers.Replace(" ", SPACE_MARK)]
    )
