"""The eight real tokenizers and the text that laws of alignment are tested on."""

import gzip
import json
from functools import cache
from pathlib import Path

import pytest

from rayfuse.align.vocab_map import VocabMaps, map_vocabulary
from rayfuse.models.tokenizer import TextTokenizer, load_tokenizer

NAMES = (
    *("gpt2", "gpt-neox-20b", "mistral-7b", "open-llama-3b", "phi-3-mini", "stories260k"),
    *("t5-small", "bert-base-uncased"),
)
DOMAINS = ("wiki", "books", "code", "math", "web", "legal", "multilingual")
ROW_CHARACTERS, EXCERPT_CHARACTERS = 3000, 150
ODD_TEXTS = [
    "literal <s> and </s> and <unk> and <|endoftext|>, [UNK] and [CLS], as text",
    "\n\n  runs   of blanks\t\tand tabs\r\n",
    "emoji 👩‍👩‍👧 and a combining e\u0301, Ünïcödé, 漢字かな交じり文, हिन्दी, العربية",
    " leading blank",
    "trailing blanks   ",
    "x",
    "ﬁne ligatures ① and №, ½ a Å",
    "1234567890 3.14159 1e-9",
    "a\x07bell and \u200bnothing, \ufeffmark",
    "0>\r",  # WordPiece leaves the end out, where others have one token for the last two
    "\x07",  # and all of this
    "{\u00af",  # T5 knows neither, and makes the second one a space and an accent
]


def read_texts(shared_data: Path, domain: str) -> list[str]:
    """Return a domain's validation text, cut into rows."""
    return [text for _, text in read_rows(shared_data, domain)]


def read_rows(shared_data: Path, domain: str) -> list[tuple[str, str]]:
    """Return a domain's validation text with its origin, cut into rows."""
    with gzip.open(shared_data / f"corpus/{domain}/valid.jsonl.gz", "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [
        (each["source"], each["text"][start : start + ROW_CHARACTERS])
        for each in records
        for start in range(0, len(each["text"]), ROW_CHARACTERS)
    ]


@pytest.fixture(scope="session")
def tokenizers(shared_data: Path) -> dict[str, TextTokenizer]:
    return {name: load_tokenizer(str(shared_data / "tokenizers" / name)) for name in NAMES}


@pytest.fixture(scope="session")
def excerpts(shared_data: Path) -> list[str]:
    """Odd texts, and some of each origin of each domain: all its languages."""
    found: dict[str, list[str]] = {}
    for domain in DOMAINS:
        for origin, text in read_rows(shared_data, domain):
            found.setdefault(origin, []).append(text[:EXCERPT_CHARACTERS])
    assert len(found) == 23
    return [*ODD_TEXTS, *(text for texts in found.values() for text in texts[:3])]


@cache
def map_tokens(source: TextTokenizer, target: TextTokenizer, *, only_equal: bool) -> VocabMaps:
    """Return the maps of a pair, made once for all tests."""
    return map_vocabulary(source, target, only_equal=only_equal)
