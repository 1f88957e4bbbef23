"""A tokenizer.json built from its parts, and control tokens hidden without building it again."""

import copy
import gc
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from rayfuse.models import text_tokenizer
from rayfuse.models.text_tokenizer import TextTokenizer, build_tokenizer
from rayfuse.models.tokenizer import PROBE
from rayfuse.models.tokenizer_json import parse_tokenizer
from tests.align.conftest import NAMES, ODD_TEXTS
from tests.fakes import byte_level_tokenizer, sentencepiece_tokenizer

Content = dict[str, Any]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def add_tokens(content: Content, **are_special: bool) -> None:
    size = 1 + max(content["model"]["vocab"].values())
    content["added_tokens"] += [
        {"id": size + i, "content": f"<{name}>", "special": special} | FLAGS
        for i, (name, special) in enumerate(are_special.items())
    ]


def write_merges_as_text(content: Content) -> None:
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]


def reverse_vocabulary(content: Content) -> None:
    content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))


def repeat_a_merge(content: Content) -> None:
    content["model"]["merges"].append(content["model"]["merges"][0])


def set_options(content: Content) -> None:
    content["model"] |= {"dropout": 0.25, "fuse_unk": True, "ignore_merges": True}


def leave_out_defaults(content: Content) -> None:
    for key in ("dropout", "fuse_unk", "byte_fallback", "ignore_merges"):
        content["model"].pop(key)


CHANGES: dict[str, Callable[[Content], None]] = {
    "none": lambda _: None,
    "merges as text": write_merges_as_text,
    "a merge twice": repeat_a_merge,
    "vocabulary in any order": reverse_vocabulary,
    "added tokens": lambda content: add_tokens(content, a=True, b=False, c=True),
    "an id that is not the next": lambda content: content["added_tokens"].append(
        {"id": 9000, "content": "<far>", "special": False} | FLAGS
    ),
    "options": set_options,
    "defaults left out": leave_out_defaults,
}
MAKERS = {"byte level": byte_level_tokenizer, "SentencePiece": sentencepiece_tokenizer}


def check_same_as_from_text(written: str) -> None:
    whole = Tokenizer.from_str(written)
    parsed = parse_tokenizer(written)
    theirs = json.dumps(json.loads(whole.to_str()), sort_keys=True)
    assert json.dumps(parsed.content, sort_keys=True) == theirs
    assert parsed.backend.to_str() == whole.to_str()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", MAKERS)
def test_parts_give_what_the_text_gives(make, change):
    content = json.loads(MAKERS[make](400).to_str())
    CHANGES[change](content)
    check_same_as_from_text(json.dumps(content))


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_real_tokenizers_give_what_the_text_gives(name, shared_data: Path):
    check_same_as_from_text((shared_data / "tokenizers" / name / "tokenizer.json").read_text())


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_as_before_after_an_error(enabled):
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(KeyError):
            parse_tokenizer("{}")
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def build_both(
    written: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[TextTokenizer, TextTokenizer]:
    """Hide control tokens as they are, and by other names in a tokenizer that is built again."""
    built = [build_tokenizer(written, start_id=None, eos_id=None, control_names=names)]
    monkeypatch.setattr(text_tokenizer, "_may_produce", lambda *_: True)
    built.append(build_tokenizer(written, start_id=None, eos_id=None, control_names=names))
    monkeypatch.undo()
    return built[0], built[1]


def make_texts(tokenizer: TextTokenizer) -> list[str]:
    """Make texts of control tokens, parts of them, and other added tokens, in any order."""
    dice = random.Random(7)
    added = sorted(tokenizer.added_names)
    parts = [*added[:40], *added[-40:], *(name[:-1] for name in added[:40]), *"<>s/ \n\tax▁|"]
    return ["".join(dice.choices(parts, k=12)) for _ in range(400)]


def check_same_tokens(written: str, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kept, renamed = build_both(written, names, monkeypatch)
    texts = [PROBE, *ODD_TEXTS, *make_texts(kept)]
    assert kept.content_hash == renamed.content_hash
    assert kept.token_bytes == renamed.token_bytes
    assert kept.control_names == renamed.control_names
    for ours, theirs in zip(
        kept.encode_with_ends(texts), renamed.encode_with_ends(texts), strict=True
    ):
        assert ours[0].tolist() == theirs[0].tolist()
        assert ours[1].tolist() == theirs[1].tolist()
    control_ids = {kept.token_names.index(name) for name in kept.control_names}
    unknown = kept.token_names.index("<unk>") if "<unk>" in kept.token_names else None
    used = {token_id for row in kept.encode(texts) for token_id in row.tolist()}
    assert not used & (control_ids - {unknown})


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copy_reads_control_tokens_as_text_too(copy_of):
    tokenizer = build_tokenizer(byte_level_tokenizer(300).to_str(), start_id=0, eos_id=0)
    texts = ["a<|end|>b"]
    assert copy_of(tokenizer).encode(texts)[0].tolist() == tokenizer.encode(texts)[0].tolist()
    assert 0 not in copy_of(tokenizer).encode(texts)[0]


ADDED = {
    "a": {"control": True, "tag": False},
    "tags inside of control tokens": {"b<t": True, "t": False, "b": False},
    "a tag that begins a control token": {"b": False, "b>x": True},
}


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("make", MAKERS)
def test_hidden_control_tokens_are_read_as_with_other_names(make, added, monkeypatch):
    content = json.loads(MAKERS[make](400).to_str())
    add_tokens(content, **ADDED[added])
    a_token = max(content["model"]["vocab"], key=len)  # a result of merges, and a control token
    for names in ([], ["<tag>", "<t>"], [a_token], ["s"]):
        check_same_tokens(json.dumps(content), names, monkeypatch)


@pytest.mark.parametrize("name", NAMES)
def test_real_control_tokens_are_read_as_with_other_names(name, shared_data: Path, monkeypatch):
    if name in ("t5-small", "bert-base-uncased"):
        pytest.skip("not BPE: always built again")
    written = (shared_data / "tokenizers" / name / "tokenizer.json").read_text()
    check_same_tokens(written, [], monkeypatch)
