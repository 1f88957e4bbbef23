"""A LoRA adapter of a model: merged at load, part of the identity, refused if it does not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rayfuse.config.base import UserError
from rayfuse.config.models import ModelSettings, SourceSettings
from rayfuse.models import adapter as adapter_files
from rayfuse.models.causal_lm import load_causal_lm
from rayfuse.models.files import (
    check_model,
    check_tensors,
    forget_model_files,
    read_model_files,
)
from rayfuse.plan.model_size import size_from_files
from tests.fakes import byte_level_tokenizer, save_adapter, save_model, save_tokenizer

peft = pytest.importorskip("peft")

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_model("llama", 320, folder)
    save_tokenizer(byte_level_tokenizer(300), folder, bos="<|end|>", eos="<|end|>")
    return folder


pytestmark = pytest.mark.usefixtures("fresh_caches")


@pytest.fixture
def model(base, tmp_path) -> ModelSettings:
    save_adapter(base, tmp_path / "adapter")
    return ModelSettings(model=str(base), adapter=str(tmp_path / "adapter"))


KINDS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "all linear layers, rank-stabilised": {"target_modules": "all-linear", "use_rslora": True},
    "one layer, two ranks": {
        "layers_to_transform": [1],
        "layers_pattern": "layers",
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 3},
    },
    "DoRA": {"use_dora": True},
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_has_the_logits_of_pefts_own(kind, base, tmp_path):
    save_adapter(base, tmp_path / "adapter", **KINDS[kind])
    model = ModelSettings(model=str(base), adapter=str(tmp_path / "adapter"))
    check_tensors(model, role="source s")
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        before = plain(IDS).logits
        wrapped = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        expected = wrapped(IDS).logits[0]
        lm = load_causal_lm(model, "cpu")
        found = lm.logits(lm.hidden_states(IDS)[0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (expected - before[0]).abs().max() > 0.01
    assert all(parameter.requires_grad for parameter in lm.model.parameters())
    assert {*lm.model.state_dict()} == {*AutoModelForCausalLM.from_pretrained(base).state_dict()}


def drop(folder: Path, part: str) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if part not in name}
    save_file(tensors, path, metadata={"format": "pt"})


def test_identity_is_of_model_and_adapter_and_changes_with_any_byte_of_both(model, tmp_path):
    def identify(settings: ModelSettings) -> str:
        forget_model_files()
        return read_model_files(settings).identity

    plain, first = identify(model.model_copy(update={"adapter": None})), identify(model)
    assert first != plain
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1e-3}, path, metadata={"format": "pt"})
    second = identify(model)
    edit_config(tmp_path, lora_alpha=5)
    assert len({plain, first, second, identify(model)}) == 4
    assert size_from_files(model) == size_from_files(model.model_copy(update={"adapter": None}))


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def turn_into_pickle(folder: Path) -> None:
    tensors = load_file(folder / "adapter/adapter_model.safetensors")
    torch.save(tensors, folder / "adapter/adapter_model.bin")
    (folder / "adapter/adapter_model.safetensors").unlink()


REFUSED = {
    "a missing folder": (
        lambda folder: shutil.rmtree(folder / "adapter"),
        "adapter is '.*', a folder that does not exist",
    ),
    "a folder without a config": (
        lambda folder: (folder / "adapter/adapter_config.json").unlink(),
        "without adapter_config.json",
    ),
    "a pickle": (turn_into_pickle, r"weights are not safetensors \(adapter_model.bin\)"),
    "another method": (
        lambda folder: edit_config(folder, peft_type="IA3"),
        "whose peft_type is 'IA3'",
    ),
    "a start that changes the base": (
        lambda folder: edit_config(folder, init_lora_weights="pissa"),
        "init_lora_weights 'pissa' changes the weights of its base",
    ),
    "an adapter that depends on the text": (
        lambda folder: edit_config(folder, alora_invocation_tokens=[4]),
        r"alora_invocation_tokens is \[4\], which rayfuse does not merge",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_adapter_that_cannot_be_merged_is_refused_before_a_cluster_is_used(name, model, tmp_path):
    change, message = REFUSED[name]
    change(tmp_path)
    with pytest.raises(UserError, match=f"source s: .*{message}"):
        check_model(model, 64, role="source s")


MISFITS = {
    "a wider base": ({"width": 64}, r"q_proj.lora_A.weight is \[4, 32\], not \[4, 64\]"),
    "another family": ({"family": "gpt_neox"}, r"Target modules .* not found in the base model"),
    "a shorter file": ({}, r"q_proj.lora_B.weight is missing"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_adapter_of_another_base_is_refused_unread_and_at_load(name, model, tmp_path):
    changes, message = MISFITS[name]
    save_model(changes.get("family", "llama"), 320, tmp_path, width=changes.get("width", 32))
    if not changes:
        drop(tmp_path / "adapter", "q_proj.lora_B")
    other = model.model_copy(update={"model": str(tmp_path)})
    with pytest.raises(UserError, match=rf"source s: adapter is .*{message}.*its own base"):
        check_tensors(other, role="source s")
    with pytest.raises(UserError, match=message):
        load_causal_lm(other, "cpu")


def test_adapter_of_a_weight_that_serves_as_embedding_and_head_is_refused(tmp_path):
    save_model("llama", 320, tmp_path, tied=True)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        save_adapter(tmp_path, tmp_path / "adapter", modules_to_save=["lm_head"])
    model = ModelSettings(model=str(tmp_path), adapter=str(tmp_path / "adapter"))
    with (
        pytest.warns(UserWarning, match="tie_word_embeddings"),
        pytest.raises(UserError, match="has one weight for both"),
    ):
        load_causal_lm(model, "cpu")


def test_missing_peft_names_the_extra(model, monkeypatch):
    monkeypatch.setattr(adapter_files, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"needs peft; pip install 'rayfuse\[lora\]'"):
        check_tensors(model, role="source s")


def test_backend_without_adapters_and_a_revision_of_none_are_refused():
    with pytest.raises(ValueError, match="adapter is 'x', which backend vllm does not merge"):
        SourceSettings(name="a", model="m", adapter="x", backend="vllm")
    with pytest.raises(ValueError, match="adapter_revision is 'v1' without adapter"):
        ModelSettings(model="m", adapter_revision="v1")
