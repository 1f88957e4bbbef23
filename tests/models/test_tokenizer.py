"""tokenizer.json verbatim, roles as transformers finds them, control tokens in text, errors."""

import json
import shutil
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from rayfuse.config.base import UserError
from rayfuse.models.text_tokenizer import build_tokenizer
from rayfuse.models.tokenizer import PROBE, describe_class_difference, load_tokenizer
from tests.fakes import byte_level_tokenizer, save_tokenizer, sentencepiece_tokenizer


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


def test_merges_with_a_control_token_as_a_part_load_and_never_give_it():
    vocab = {"<unk>": 0, "<": 1, "u": 2, "n": 3, "k": 4, ">": 5, "=": 6, "k>": 7, "=<unk>": 8}
    plain = Tokenizer(models.BPE(vocab, [("k", ">"), ("=", "<unk>")], unk_token="<unk>"))
    plain.add_special_tokens(["<unk>"])
    tokenizer = build_tokenizer(plain.to_str(), start_id=None, eos_id=None)
    assert tokenizer.encode(["=<unk>"])[0].tolist() == [6, 1, 2, 3, 7]


@pytest.fixture
def folder(valid, tmp_path) -> Path:
    load_tokenizer.cache_clear()
    return shutil.copytree(valid, tmp_path / "tokenizer")


def edit(path: Path, **values: object) -> dict:
    """Change keys of a JSON file; None removes one. Returns the content."""
    content = (json.loads(path.read_text()) if path.exists() else {}) | values
    content = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(content))
    return content


DIGITS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer"])
def test_tokenizer_json_decides_whatever_class_transformers_would_build(name, folder):
    edit(folder / "tokenizer.json", pre_tokenizer=DIGITS)
    edit(folder / "tokenizer_config.json", tokenizer_class=name)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.encode([PROBE])[0].tolist() == own.encode(PROBE).ids
    if name == "GPT2Tokenizer":  # the others keep the digits apart, too
        note = str(describe_class_difference(str(folder)))
        assert "class GPT2Tokenizer of transformers gives other tokens" in note
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    load_tokenizer.cache_clear()
    assert describe_class_difference(str(folder)) is None
    assert load_tokenizer(str(folder)).content_hash == tokenizer.content_hash


ADDED = {"content": "<|new|>", "lstrip": False, "rstrip": False, "normalized": False}

ROLE_FILES = {
    "special_tokens_map.json": {"special_tokens_map.json": {"bos_token": "<|end|>"}},
    "a role as an object": {
        "special_tokens_map.json": {"bos_token": ADDED | {"content": "<|end|>"}}
    },
    "added_tokens_decoder": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {"300": ADDED | {"special": True}},
            "bos_token": "<|new|>",
        }
    },
    "added_tokens.json": {
        "added_tokens.json": {"<|new|>": 300},
        "special_tokens_map.json": {"bos_token": "<|new|>"},
    },
}


@pytest.mark.parametrize("name", ROLE_FILES)
def test_roles_are_those_that_transformers_finds(name, folder):
    edit(folder / "tokenizer_config.json", bos_token=None, added_tokens_decoder=None)
    for file, values in ROLE_FILES[name].items():
        edit(folder / file, **values)
    tokenizer = load_tokenizer(str(folder))
    theirs = AutoTokenizer.from_pretrained(str(folder))
    assert theirs.bos_token_id is not None
    assert (tokenizer.start_id, tokenizer.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    marker = str(theirs.bos_token)
    assert tokenizer.start_id not in tokenizer.encode([f"a {marker} b"])[0]
    assert tokenizer.count_control_names([f"a {marker} b {marker}"]) == 2


def test_added_tokens_are_text_unless_the_file_calls_them_special(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    names = ["<think>", "<td>", "<hidden>", "[MASK]"]
    content["added_tokens"] += [
        {"id": 300 + i, "content": name, "special": name == "<hidden>"} | flags
        for i, name in enumerate(names)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    edit(folder / "tokenizer_config.json", added_tokens_decoder=None, mask_token="[MASK]")
    tokenizer = load_tokenizer(str(folder))
    (ids,) = tokenizer.encode(["<td>9<think>" + "<hidden>[MASK]"])
    assert {300, 301} <= set(ids.tolist())
    assert {302, 303}.isdisjoint(ids.tolist())
    assert [tokenizer.token_bytes[i] for i in range(300, 304)] == [b"<think>", b"<td>", b"", b""]
    assert b"".join(tokenizer.token_bytes[i] or b"" for i in ids) == b"<td>9<think><hidden>[MASK]"


def test_dropout_of_merges_is_off(folder):
    plain = load_tokenizer(str(folder))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    (folder / "tokenizer.json").write_text(json.dumps(content))
    load_tokenizer.cache_clear()
    tokenizer = load_tokenizer(str(folder))
    assert {tuple(tokenizer.encode([PROBE])[0]) for _ in range(5)} == {
        tuple(plain.encode([PROBE])[0])
    }
    assert tokenizer.content_hash == plain.content_hash


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_token_bytes_are_known_without_a_decoder(make):
    content = json.loads(make(330).to_str())
    before = build_tokenizer(json.dumps(content), start_id=None, eos_id=None)
    after = build_tokenizer(json.dumps(content | {"decoder": None}), start_id=None, eos_id=None)
    assert after.token_bytes == before.token_bytes


def test_word_ends_in_the_vocabulary_are_refused_by_name(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["end_of_word_suffix"] = "</w>"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer.json: model.end_of_word_suffix is '</w>'"):
        load_tokenizer(str(folder))


def test_id_far_behind_all_others_is_refused(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["far"] = 50_000_000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"its 301 tokens have ids up to 50000000"):
        load_tokenizer(str(folder))


def test_many_added_tokens_are_read_in_linear_time(folder):
    size = load_tokenizer(str(folder)).vocab_size
    added = {f"<added {i}>": size + i for i in range(20_000)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    load_tokenizer.cache_clear()
    began = time.process_time()
    tokenizer = load_tokenizer(str(folder))
    assert time.process_time() - began < 10
    assert tokenizer.vocab_size == size + len(added)
    assert tokenizer.token_names[-1] == "<added 19999>"


def test_code_of_another_repository_is_refused_for_a_tokenizer_too(folder):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "Own"}
    config["auto_map"] = {"AutoTokenizer": ["other/repository--module.Class", None]}
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"tokenizer_config.json: auto_map takes code from another"):
        load_tokenizer(str(folder), trust_remote_code=True)


def test_a_home_folder_is_expanded_for_a_tokenizer_of_its_own_class(folder, monkeypatch):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    path.write_text(json.dumps(config))
    monkeypatch.setenv("HOME", str(folder.parent))
    found = load_tokenizer(f"~/{folder.name}")
    assert found.content_hash == load_tokenizer(str(folder)).content_hash


def test_sentencepiece_model_alone_is_an_error_with_the_conversion(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x05")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(UserError, match=r"SentencePiece model but no tokenizer.json: convert it"):
        load_tokenizer(str(tmp_path))


def test_panic_inside_the_tokenizers_library_is_an_error_like_others(folder):
    edit(
        folder / "tokenizer.json",
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": "(x+x+)+y"},
            "behavior": "Isolated",
            "invert": False,
        },
    )
    tokenizer = load_tokenizer(str(folder))
    for encode in (tokenizer.encode, tokenizer.encode_with_ends):
        with pytest.raises(UserError, match=r"fails on a text \(Onig: .*retry-limit"):
            encode(["x" * 60])
