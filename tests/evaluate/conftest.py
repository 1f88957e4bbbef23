"""Tiny random LLMs and the rows they are scored on."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from rayfuse.schema import CORPUS
from tests.fakes import byte_level_tokenizer, save_model, save_tokenizer

TEXTS = ["The cat sat.", "a", "def f(x):\n    return x + 1\n", "naïve café 日本", "<s> is text"]


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return a function that saves a Llama with one token a byte and a head of a given width."""

    def make(head_width: int) -> Path:
        folder = tmp_path_factory.mktemp(f"llama-{head_width}")
        save_model("llama", head_width, folder)
        save_tokenizer(byte_level_tokenizer(257), folder, bos=None, eos="<|end|>")
        return folder

    return make


@pytest.fixture(scope="session")
def rows() -> pa.Table:
    """Return held-out rows of four documents, the first two rows of one."""
    documents = ["d0", "d0", "d1", "d2", "d3"]
    places = [0, 1, 0, 0, 0]
    columns = {
        "row_id": [f"{doc_id}#{place}" for doc_id, place in zip(documents, places, strict=True)],
        "doc_id": documents,
        "domain": ["prose", "prose", "code", "prose", "prose"],
        "text": TEXTS,
        "num_bytes": [len(text.encode()) for text in TEXTS],
        "ends_document": [False, True, True, True, True],
        "target_ids": [[0]] * len(TEXTS),
    }
    return pa.Table.from_pydict(columns, schema=CORPUS)
