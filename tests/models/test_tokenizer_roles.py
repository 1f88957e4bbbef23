"""Roles read from a folder's files are those of the tokenizer's class in transformers."""

import inspect
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import transformers

from rayfuse.models import tokenizer as tokenizer_module
from rayfuse.models.text_tokenizer import TextTokenizer
from rayfuse.models.tokenizer import DEFAULT_ROLES, PLAIN_CLASSES, ROLES, load_tokenizer
from tests.fakes import byte_level_tokenizer, sentencepiece_tokenizer

Config = dict[str, Any]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
CONTROLS = ("<a>", "<b>", "<c>", "<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "<mask>")
ADDED = {"content": "<a>", "lstrip": False, "normalized": False, "rstrip": False}


def write_folder(folder: Path, config: Config, **files: Config) -> str:
    """Write a tokenizer whose added tokens are plain ones, unless a role makes them control."""
    content = json.loads(byte_level_tokenizer(300).to_str())
    content["added_tokens"] += [
        {"id": 300 + i, "content": name, "special": False} | FLAGS
        for i, name in enumerate(CONTROLS)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in {"tokenizer": content, "tokenizer_config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return str(folder)


def load_both(folder: str, monkeypatch: pytest.MonkeyPatch) -> tuple[TextTokenizer, TextTokenizer]:
    """Load by the files if they suffice, and by the class."""
    load_tokenizer.cache_clear()
    by_files = load_tokenizer(folder)
    monkeypatch.setattr(tokenizer_module, "_names_all_roles", lambda *_: False)
    load_tokenizer.cache_clear()
    by_class = load_tokenizer(folder)
    monkeypatch.undo()
    return by_files, by_class


def check_same(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = load_both(folder, monkeypatch)
    assert (ours.start_id, ours.eos_id) == (theirs.start_id, theirs.eos_id)
    assert ours.control_names == theirs.control_names
    assert ours.content_hash == theirs.content_hash


@pytest.mark.parametrize("name", DEFAULT_ROLES)
def test_table_has_the_roles_that_a_class_fills_by_itself(name):
    parameters = inspect.signature(getattr(transformers, name).__init__).parameters
    filled = {key for key, found in parameters.items() if key in ROLES and found.default}
    assert filled == set(DEFAULT_ROLES[name])


GIVEN: dict[str, Config] = {
    "all": {role: f"<{'abc'[i % 3]}>" for i, role in enumerate(ROLES)},
    "objects": {role: ADDED | {"__type": "AddedToken"} for role in ROLES},
    "null": dict.fromkeys(ROLES) | {"eos_token": "<b>"},
    "none": {},
    "one": {"eos_token": "<c>"},
    "a list": dict.fromkeys(ROLES, "<a>") | {"additional_special_tokens": ["<b>", "<pad>"]},
    "another list": dict.fromkeys(ROLES, "<a>") | {"extra_special_tokens": ["<b>", "<pad>"]},
    "two lists": dict.fromkeys(ROLES, "<a>")
    | {"extra_special_tokens": ["<b>"], "additional_special_tokens": ["<c>"]},
    "named": dict.fromkeys(ROLES, "<a>") | {"extra_special_tokens": {"image_token": "<c>"}},
    "an own role": dict.fromkeys(ROLES, "<a>") | {"image_token": "<b>", "add_bos_token": True},
    "own roles": dict.fromkeys(ROLES, "<a>")
    | {"model_specific_special_tokens": {"image_token": "<b>"}},
    "added": dict.fromkeys(ROLES, "<a>")
    | {"added_tokens_decoder": {"301": ADDED | {"content": "<b>", "special": True}}},
}


@pytest.mark.parametrize(("name", "given"), list(product([*DEFAULT_ROLES, *PLAIN_CLASSES], GIVEN)))
def test_roles_are_those_of_the_class(name, given, tmp_path, monkeypatch):
    config = {"tokenizer_class": name} | GIVEN[given]
    check_same(write_folder(tmp_path, config), monkeypatch)


def test_special_tokens_map_is_read_by_the_class_that_knows_when_it_counts(tmp_path, monkeypatch):
    config = {"tokenizer_class": "LlamaTokenizerFast"} | dict.fromkeys(ROLES, "<a>")
    special = {"eos_token": "<b>", "additional_special_tokens": ["<c>"]}
    older = write_folder(tmp_path / "older", config, special_tokens_map=special)
    check_same(older, monkeypatch)
    newer = config | {"added_tokens_decoder": {}}
    folder = write_folder(tmp_path / "newer", newer, special_tokens_map=special)
    check_same(folder, monkeypatch)
    assert load_tokenizer(older).content_hash != load_tokenizer(folder).content_hash


@pytest.mark.parametrize("name", DEFAULT_ROLES)
def test_class_is_not_loaded_where_files_name_all_its_roles(name, tmp_path, monkeypatch):
    config = {"tokenizer_class": name} | GIVEN["all"]
    folder = write_folder(tmp_path, config)
    monkeypatch.setattr(tokenizer_module, "_load_class", None)  # would be an error if called
    load_tokenizer.cache_clear()
    assert load_tokenizer(folder).eos_id == 301


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt-neox-20b", "mistral-7b", "open-llama-3b", "phi-3-mini", "stories260k"]
)
def test_real_tokenizers_are_the_same_by_files_and_class(
    name, tmp_path, shared_data: Path, monkeypatch
):
    source = shared_data / "tokenizers" / name
    config = json.loads((source / "tokenizer_config.json").read_text())
    kind = "GPT2Tokenizer" if name.startswith("gpt") else "LlamaTokenizer"
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"unk_token": None} | config | {"tokenizer_class": kind})
    )
    check_same(str(tmp_path), monkeypatch)


def write_large_folder(folder: Path) -> str:
    """Write a tokenizer of Gemma's size: 266,000 tokens, 528,000 merges, 6,000 control tokens."""
    letters = [chr(code) for code in range(0x4E00, 0x4E40)]
    pairs = list(product(letters, repeat=2))
    triples = list(product(letters, repeat=3))
    merges = [*pairs, *((a + b, c) for a, b, c in triples), *((a, b + c) for a, b, c in triples)]
    names = [*CONTROLS, *(f"<unused{i}>" for i in range(6000))]
    tokens = [*names, "\u2581", *letters, *map("".join, pairs), *map("".join, triples)]
    content = json.loads(sentencepiece_tokenizer(300).to_str())
    content["added_tokens"] = [
        {"id": i, "content": name, "special": True} | FLAGS for i, name in enumerate(names)
    ]
    content["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    content["model"]["merges"] = merges
    roles = {f"{role}_token": f"<{role}>" for role in ("bos", "eos", "unk", "pad", "mask")}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GemmaTokenizer"} | roles)
    )
    return str(folder)


INSPECT = """
import resource, sys
from rayfuse.inspect.command import inspect_tokenizers
report = inspect_tokenizers(sys.argv[1], sys.argv[1], "\u4e00\u4e01 \u4e02\u4e03")
assert report["share_with_signal"] == 1.0, report
assert not {"torch", "transformers"} & set(sys.modules)
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime)
"""


def test_tokenizer_of_262_000_tokens_is_inspected_in_seconds_without_transformers(tmp_path):
    folder = write_large_folder(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", INSPECT, folder],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 8  # 3 seconds where nothing else runs
