"""Tokenizer files that are damaged or not there: the message names them and says what to do."""

import json
import shutil
from pathlib import Path

import pytest

from rayfuse.tokens import load_tokenizer
from tests.fakes import byte_level_tokenizer, save_tokenizer


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(byte_level_tokenizer(300), folder, bos="<|end|>", eos="<|end|>")
    return folder


def without(content: bytes, *keys: str) -> bytes:
    return json.dumps({k: v for k, v in json.loads(content).items() if k not in keys}).encode()


DAMAGES = {
    "cut off": lambda content: content[: len(content) // 2],
    "no UTF-8": lambda content: b"\xff" + content,
    "empty": lambda content: b"",
    "a list": lambda content: b"[1, 2]",
    "a number": lambda content: b"7",
}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(name, damage, sound, tmp_path):
    folder = shutil.copytree(sound, tmp_path / "broken")
    path = folder / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{name} is damaged .*save it again") as error:
        load_tokenizer(str(folder))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", lambda content: without(content, "model")),
        (
            "tokenizer.json",
            lambda content: b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
        ),
        ("tokenizer_config.json", lambda c: c.replace(b'"<|end|>"', b'{"name": "<|end|>"}')),
        ("tokenizer_config.json", lambda c: c.replace(b'"<|end|>"', b"12")),
    ],
)
def test_a_file_of_another_structure_is_named(name, change, sound, tmp_path):
    folder = shutil.copytree(sound, tmp_path / "broken")
    path = folder / name
    before = path.read_bytes()
    path.write_bytes(change(before))
    assert path.read_bytes() != before
    with pytest.raises(ValueError, match=rf"{name} is damaged .*save it again"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_folder_that_is_not_there_is_called_one(model):
    with pytest.raises(ValueError, match=r"a folder that does not exist; check the path"):
        load_tokenizer(model)
