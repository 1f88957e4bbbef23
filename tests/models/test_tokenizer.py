"""Tokenizer files that are damaged or not there: the message names them and says what to do."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from rayfuse.models.tokenizer import build_tokenizer, load_tokenizer
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


def spells_its_markers(model: models.Model) -> Tokenizer:
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
def test_no_model_spells_a_marker_in_a_text_with_its_control_token(model):
    plain = spells_its_markers(model)
    plain.encode_special_tokens = True
    assert 1 in plain.encode("<s>").ids  # this one does, left to itself
    tokenizer = build_tokenizer(plain.to_str(), start_id=1, eos_id=None)
    (ids,) = tokenizer.encode(["the <s> the"])
    assert 1 not in ids.tolist()
    assert tokenizer.token_names[:2] == ("[UNK]", "<s>")
    assert tokenizer.encode(["never"])[0].tolist()[0] == 0
