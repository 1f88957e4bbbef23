"""Mutated files of a model: it is refused with a `UserError`, or read and used as it is."""

import json
import shutil
import time
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given

from rayfuse.config.base import UserError
from rayfuse.config.models import ModelSettings
from rayfuse.models.files import check_model, load_recipe_tokenizer
from tests.fakes import (
    SAMPLE,
    byte_level_tokenizer,
    save_model,
    save_tokenizer,
    sentencepiece_tokenizer,
)
from tests.fuzz.mutations import edits, fuzz, json_edits, mutate_bytes, mutate_json

JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
FILES = (*JSON_FILES, "model.safetensors")
MAX_SECONDS = 30.0
_NUMBERS = count()


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def model(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "byte_level":
        save_model("gpt_neox", 320, folder)
        save_tokenizer(byte_level_tokenizer(300), folder, bos="<|end|>", eos="<|end|>")
    else:
        save_model("llama", 330, folder)
        save_tokenizer(sentencepiece_tokenizer(330), folder, bos="<s>", eos="</s>")
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    return folder


def use_model(model: Path, file: str, content: bytes, tmp_path: Path) -> None:
    """Check a copy of a model with one file replaced, and tokenize with it."""
    folder = tmp_path / str(next(_NUMBERS))
    shutil.copytree(model, folder)
    (folder / file).write_bytes(content)
    settings = ModelSettings(model=str(folder))
    began = time.monotonic()
    try:
        check_model(settings, 128, role="target")
        tokenizer = load_recipe_tokenizer(settings)
        rows = tokenizer.encode_rows(SAMPLE, [True] * len(SAMPLE))
    except UserError as error:
        assert str(error).strip()
    else:
        assert all(
            0 <= row.min(initial=0) <= row.max(initial=0) < tokenizer.vocab_size for row in rows
        )
    assert time.monotonic() - began < MAX_SECONDS
    shutil.rmtree(folder)


@pytest.mark.parametrize("file", JSON_FILES)
def test_a_model_with_mutated_values(model, file, tmp_path):
    content = json.loads((model / file).read_bytes())

    @fuzz(15)
    @given(json_edits)
    def check(drawn):
        use_model(model, file, mutate_json(content, drawn), tmp_path)

    check()


@pytest.mark.parametrize("file", FILES)
def test_a_model_with_mutated_bytes(model, file, tmp_path):
    content = (model / file).read_bytes()

    @fuzz(12)
    @given(edits)
    def check(drawn):
        use_model(model, file, mutate_bytes(content, drawn), tmp_path)

    check()
