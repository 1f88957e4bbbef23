"""Errors for corrupt and missing tokenizer files, and control tokens in text."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from rayfuse.models.tokenizer import build_tokenizer, load_tokenizer
from tests.fakes import byte_level_tokenizer, save_tokenizer


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> Path:
    """Create a folder with a valid tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(byte_level_tokenizer(300), folder, bos="<|end|>", eos="<|end|>")
    return folder


def remove_keys(content: bytes, *keys: str) -> bytes:
    values = json.loads(content)
    return json.dumps({key: values[key] for key in values if key not in keys}).encode()


CORRUPTIONS = {
    "truncated": lambda content: content[: len(content) // 2],
    "no UTF-8": lambda content: b"\xff" + content,
    "empty": lambda content: b"",
    "a list": lambda content: b"[1, 2]",
    "a number": lambda content: b"7",
}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_error_names_a_corrupt_file(name, corruption, valid, tmp_path):
    folder = shutil.copytree(valid, tmp_path / "corrupt")
    path = folder / name
    path.write_bytes(CORRUPTIONS[corruption](path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{name} is corrupt .*save it again") as error:
        load_tokenizer(str(folder))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", lambda content: remove_keys(content, "model")),
        (
            "tokenizer.json",
            lambda content: b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
        ),
        ("tokenizer_config.json", lambda c: c.replace(b'"<|end|>"', b'{"name": "<|end|>"}')),
        ("tokenizer_config.json", lambda c: c.replace(b'"<|end|>"', b"12")),
    ],
)
def test_error_names_a_file_with_an_unexpected_structure(name, change, valid, tmp_path):
    folder = shutil.copytree(valid, tmp_path / "corrupt")
    path = folder / name
    before = path.read_bytes()
    path.write_bytes(change(before))
    assert path.read_bytes() != before
    with pytest.raises(ValueError, match=rf"{name} is corrupt .*save it again"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_model_that_looks_like_a_path_must_be_a_folder(model):
    with pytest.raises(ValueError, match=r"a folder that does not exist; check the path"):
        load_tokenizer(model)


def build_with_control_tokens(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "[UNK]"])
    return tokenizer


WORDS = {"[UNK]": 0, "<s>": 1, "<": 2, "s": 3, ">": 4, "s>": 5, "the": 6}


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel(WORDS, unk_token="[UNK]"),
        models.BPE(WORDS, [("s", ">"), ("<", "s>")], unk_token="[UNK]"),
        models.WordPiece(WORDS | {"##s": 7, "##>": 8}, unk_token="[UNK]"),
        models.Unigram([(word, -1.0) for word in WORDS], unk_id=0),
    ],
    ids=lambda model: type(model).__name__,
)
def test_text_is_never_encoded_as_a_control_token(model):
    plain = build_with_control_tokens(model)
    plain.encode_special_tokens = True
    assert 1 in plain.encode("<s>").ids  # the model alone does so, whatever the flag
    tokenizer = build_tokenizer(plain.to_str(), start_id=1, eos_id=None)
    (ids,) = tokenizer.encode(["the <s> the"])
    assert 1 not in ids.tolist()
    assert tokenizer.token_names[:2] == ("[UNK]", "<s>")
    assert tokenizer.encode(["never"])[0].tolist()[0] == 0
