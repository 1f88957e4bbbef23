"""A model is exactly its files: what is missing, changed, beside or around them is found."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from rayfuse.config.base import UserError
from rayfuse.config.models import ModelSettings
from rayfuse.models import file_hash
from rayfuse.models.causal_lm import load_causal_lm, split_head
from rayfuse.models.config_file import read_context_tokens
from rayfuse.models.file_hash import hash_file
from rayfuse.models.files import (
    check_model,
    check_tensors,
    find_difference,
    forget_model_files,
    read_model_files,
)
from rayfuse.models.folder import TOKENIZER_FILES, copy_files
from tests.fakes import byte_level_tokenizer, save_model, save_tokenizer

Tensors = dict[str, torch.Tensor]

LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> Path:
    """Create a folder with a valid model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    save_model("llama", 320, folder)
    save_tokenizer(byte_level_tokenizer(300), folder, bos="<|end|>", eos="<|end|>")
    return folder


pytestmark = pytest.mark.usefixtures("fresh_caches")


@pytest.fixture
def model(valid, tmp_path) -> ModelSettings:
    return ModelSettings(model=str(shutil.copytree(valid, tmp_path / "copy")))


def rewrite(model: ModelSettings, change: Callable[[Tensors], Tensors]) -> None:
    path = Path(model.model, "model.safetensors")
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def edit_config(model: ModelSettings, **values: object) -> None:
    path = Path(model.model, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def remove(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensors[key] for key in tensors if key != name}


BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a missing tensor": (remove(LAYER), f"{LAYER} is missing"),
    "no head": (remove("lm_head.weight"), "lm_head.weight is missing"),
    "a renamed tensor": (
        lambda tensors: remove(LAYER)(tensors) | {"other": tensors[LAYER]},
        f"{LAYER} is missing; other is unknown to the architecture",
    ),
    "another shape": (
        lambda tensors: tensors | {LAYER: tensors[LAYER][1:].contiguous()},
        rf"{LAYER} is \[63, 32\], not \[64, 32\] is of another shape",
    ),
    "one too many": (
        lambda tensors: tensors | {"model.layers.0.mlp.up_proj.bias": torch.zeros(64)},
        "up_proj.bias is unknown to the architecture",
    ),
    "no tensors": (lambda _: {}, r"and 1\d more are missing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_weights_that_are_not_those_of_the_config_are_refused_unread_and_at_load(name, model):
    change, message = BROKEN[name]
    rewrite(model, change)
    with pytest.raises(UserError, match=f"source s: model is '{model.model}'.*{message}"):
        check_tensors(model, role="source s")
    with pytest.raises(UserError, match=message):
        load_causal_lm(model, "cpu")


def test_tied_weights_and_submodules_for_images_may_be_missing_and_present(tmp_path):
    save_model("llama", 320, tmp_path, tied=True)
    model = ModelSettings(model=str(tmp_path))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    rewrite(model, lambda tensors: tensors | {"model.visual.blocks.0.weight": torch.zeros(2)})
    check_tensors(model, role="target")
    load_causal_lm(model, "cpu")


def fail(*_: object) -> None:
    raise AssertionError("called")


def test_a_model_that_passed_is_not_built_again(model, monkeypatch):
    check_tensors(model, role="target")
    monkeypatch.setattr("rayfuse.models.architecture.compare_tensors", fail)
    check_tensors(model, role="target")
    rewrite(model, remove(LAYER))
    forget_model_files()
    with pytest.raises(AssertionError, match="called"):
        check_tensors(model, role="target")


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def split_weights(folder: Path, index: object) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def add_adapter(folder: Path) -> None:
    adapter = {"base_model_name_or_path": "other/model", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))


def leave_adapter(folder: Path) -> None:
    add_adapter(folder)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "an adapter": (add_adapter, r"a folder with a PEFT adapter .*; name its base as `model`"),
    "only an adapter": (
        leave_adapter,
        r"a folder with a PEFT adapter .*; name its base as `model`",
    ),
    "pickles": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        r"not safetensors \(pytorch_model.bin\).*convert them",
    ),
    "GGUF": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model-q4.gguf"),
        r"weights are GGUF \(model-q4.gguf\).*convert them",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        r"without config.json and \*.safetensors",
    ),
    "a missing shard": (
        lambda folder: split_weights(
            folder, {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        ),
        r"names 2 files; 1 are missing, the first is 'model-2.safetensors'; download it again",
    ),
    "a shard elsewhere": (
        lambda folder: split_weights(folder, {"weight_map": {"a": "../x.safetensors"}}),
        "weight_map must give each tensor a file of this folder",
    ),
    "an index that is a list": (
        lambda folder: split_weights(folder, [1]),
        "expected a JSON object, found a list",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_without_exactly_one_complete_set_of_weights_is_refused_by_name(name, model):
    change, message = FOLDERS[name]
    change(Path(model.model))
    with pytest.raises(UserError, match=f"target: .*{message}") as error:
        check_model(model, 64, role="target")
    assert model.model in str(error.value)


def test_incomplete_weight_file_is_named(model):
    cut_weights(Path(model.model))
    with pytest.raises(UserError, match=r"model.safetensors is incomplete or no safetensors"):
        check_tensors(model, role="target")


CONFIGS: dict[str, tuple[bytes, str]] = {
    "a list": (b"[1]", "expected a JSON object, found a list"),
    "no UTF-8": (b'{"a": "\xff"}', "corrupt"),
    "incomplete": (b'{"vocab_size": 3', "corrupt"),
    "deep": (b"[" * 100_000, "corrupt"),
    "no width": (b'{"model_type": "vit"}', "vocab_size is None"),
    "a text as width": (b'{"vocab_size": "many"}', "vocab_size is 'many'"),
    "a million layers": (
        b'{"vocab_size": 9, "num_hidden_layers": 1000000}',
        "num_hidden_layers is 1000000, more than 4096",
    ),
    "huge": (b'{"a": "' + b"x" * 2**24 + b'"}', "bytes, more than"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_that_cannot_be_used_is_one_error_with_its_path(name, model):
    content, message = CONFIGS[name]
    path = Path(model.model, "config.json")
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_model_files(model)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_width_and_context_are_read_below_text_config(model):
    config = json.loads(Path(model.model, "config.json").read_text())
    Path(model.model, "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": config})
    )
    assert read_model_files(model).head_width == 320
    assert read_context_tokens(model) == 512


def test_width_that_config_json_leaves_to_the_family_is_the_familys(model):
    Path(model.model, "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert read_model_files(model).head_width == 32_000


def test_identity_changes_with_any_byte_that_decides_the_result(model):
    def identify(**settings: object) -> str:
        forget_model_files()
        return read_model_files(model.model_copy(update=settings)).identity

    first = identify()
    (Path(model.model) / "modeling_own.py").write_text("a = 1")
    assert identify() == first  # it is not run
    with_code = identify(trust_remote_code=True)
    assert with_code != first
    (Path(model.model) / "modeling_own.py").write_text("a = 2")
    assert identify(trust_remote_code=True) not in (first, with_code)
    rewrite(model, lambda tensors: tensors | {LAYER: tensors[LAYER] + 1e-3})
    assert identify() != first


def test_every_byte_of_a_large_file_counts_and_it_is_read_one_time(tmp_path, monkeypatch):
    monkeypatch.setattr(file_hash, "MIN_CACHED_BYTES", 1000)
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(80 * 2**20)  # more than any sample of a file would read
    first = hash_file(path)
    monkeypatch.setattr(file_hash, "_hash_content", fail)
    assert hash_file(path) == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_hash, "MIN_CACHED_BYTES", 1000)
    state = path.stat()
    with open(path, "r+b") as file:
        file.seek(33_333_333)
        file.write(b"x")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # the same size, time and inode
    assert hash_file(path) != first


@pytest.mark.parametrize("content", [b"", b"[]", b'{"state": {}, "hash": "0"}'])
def test_corrupt_cache_of_hashes_is_not_believed(content, tmp_path, monkeypatch):
    monkeypatch.setattr(file_hash, "MIN_CACHED_BYTES", 10)
    path = tmp_path / "large"
    path.write_bytes(b"some bytes of weights")
    first = hash_file(path)
    (entry,) = (tmp_path / "cache").rglob("*.json")
    entry.write_bytes(content)
    assert hash_file(path) == first


def test_added_tokens_behind_the_last_logit_are_named_with_the_remedy(model):
    path = Path(model.model, "tokenizer.json")
    content = json.loads(path.read_text())
    edit_config(model, vocab_size=300)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"].append({"id": 300, "content": "[PAD]", "special": True} | flags)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"1 tokens \('\[PAD\]'\).*remove them from added_tokens"):
        check_model(model, 64, role="source s")


def test_difference_that_both_configs_state_is_named_first(valid, model):
    ours = read_model_files(ModelSettings(model=str(valid)))
    config = json.loads(Path(model.model, "config.json").read_text())
    config = {key: config[key] for key in config if key != "head_dim"} | {"hidden_size": 64}
    Path(model.model, "config.json").write_text(json.dumps(config))
    assert find_difference(ours, read_model_files(model)) == "its hidden_size is 64, not 32"


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_that_a_config_names_are_not_used(key, valid, model):
    edit_config(model, **{key: "kernels-community/flash-attn@main"})
    lm = load_causal_lm(model, "cpu")
    assert lm.model.config._attn_implementation == "sdpa"
    ids = torch.arange(9)[None]
    plain = load_causal_lm(ModelSettings(model=str(valid)), "cpu")
    assert torch.equal(lm.hidden_states(ids), plain.hidden_states(ids))


def test_own_code_of_another_repository_is_refused_before_it_runs(model):
    edit_config(model, auto_map={"AutoModelForCausalLM": "other/repository--modeling.Own"})
    read_model_files(model)
    with pytest.raises(UserError, match=r"auto_map takes code from another repository \(other/"):
        read_model_files(model.model_copy(update={"trust_remote_code": True}))


def test_error_inside_a_models_code_names_the_model(model):
    edit_config(model, rope_parameters={"rope_type": "default", "rope_theta": "x"})
    with pytest.raises(UserError, match=f"model is '{model.model}', which cannot be loaded"):
        load_causal_lm(model, "cpu")


def test_error_in_the_first_forward_pass_names_the_model():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes)

    class Fails(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            raise TypeError("unexpected argument 'use_cache'")

    with pytest.raises(UserError, match=r"model is 'own', which fails in a forward pass \(TypeE"):
        split_head(Fails(config), name="own")


def test_values_that_are_not_finite_name_the_dtype_and_the_remedy(model):
    rewrite(model, lambda tensors: tensors | {LAYER: tensors[LAYER] * 1e9})
    half = model.model_copy(update={"dtype": "float16"})
    with pytest.raises(UserError, match=r"not finite in float16; set its dtype to bfloat16"):
        load_causal_lm(half, "cpu")


def test_published_tokenizer_files_are_the_targets_byte_for_byte(valid, tmp_path):
    source = shutil.copytree(valid, tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tools.jinja").write_text("{{ tools }}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    copy_files(source, tmp_path / "published", TOKENIZER_FILES)
    published = {
        file.relative_to(tmp_path / "published").as_posix(): file.read_bytes()
        for file in (tmp_path / "published").rglob("*")
        if file.is_file()
    }
    assert {"tokenizer.json", "additional_chat_templates/tools.jinja"} <= published.keys()
    assert all((source / name).read_bytes() == data for name, data in published.items())
    assert "model.safetensors" not in published


def test_link_out_of_a_model_folder_is_not_published(valid, tmp_path):
    source = shutil.copytree(valid, tmp_path / "source")
    (tmp_path / "secret").write_text("secret")
    (source / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"chat_template.jinja is a link to a file outside"):
        copy_files(source, tmp_path / "published", TOKENIZER_FILES)
