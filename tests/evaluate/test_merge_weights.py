"""Weights are averaged tensor by tensor, where models have the same ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.config.load import parse_recipe
from rayfuse.config.models import ModelSettings
from rayfuse.evaluate.bits_per_byte import load_scored_model
from rayfuse.evaluate.merged_weights import average_weights
from rayfuse.models.files import ModelFiles, find_difference
from rayfuse.models.tokenizer import load_tokenizer
from rayfuse.run.layout import Layout, plan_layout
from tests.fakes import byte_level_tokenizer, save_adapter, save_model, save_tokenizer


def make_model(folder: Path, seed: int, *, tied: bool = False, vocab_size: int = 260) -> Path:
    save_model("llama", vocab_size, folder, tied=tied)
    save_tokenizer(byte_level_tokenizer(257), folder, bos=None, eos="<|end|>")
    torch.manual_seed(seed)
    path = folder / "model.safetensors"
    weights = {name: torch.randn_like(tensor) for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_is_the_mean_and_the_model_loads(tmp_path: Path, tied: bool):
    folders = [make_model(tmp_path / name, seed, tied=tied) for seed, name in enumerate("abc")]
    (tmp_path / "merged").mkdir()
    average_weights(folders, tmp_path / "merged")
    parts = [load_scored_model(ModelSettings(model=str(f))).model.state_dict() for f in folders]
    merged = load_scored_model(ModelSettings(model=str(tmp_path / "merged"))).model.state_dict()
    assert merged.keys() == parts[0].keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, sum(part[name] for part in parts) / 3)
    own = load_tokenizer(str(tmp_path / "merged")).content_hash
    assert own == load_tokenizer(str(folders[0])).content_hash


def test_a_bfloat16_model_averaged_with_itself_is_bit_identical(tmp_path: Path):
    folder = make_model(tmp_path / "a", 1)
    path = folder / "model.safetensors"
    weights = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    weights["steps"] = torch.tensor([7])  # no weight: kept as it is
    save_file(weights, path, metadata={"format": "pt"})
    (tmp_path / "merged").mkdir()
    average_weights([folder, folder, folder], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in weights.items())


def test_a_model_in_several_files_is_averaged_with_one_in_a_single_file(tmp_path: Path):
    single, parts = make_model(tmp_path / "a", 1), make_model(tmp_path / "b", 2)
    weights = load_file(parts / "model.safetensors")
    names = sorted(weights)
    (parts / "model.safetensors").unlink()
    files = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, own in files.items():
        save_file({name: weights[name] for name in own}, parts / file, metadata={"format": "pt"})
    index = {name: file for file, own in files.items() for name in own}
    (parts / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    (tmp_path / "merged").mkdir()
    average_weights([parts, single], tmp_path / "merged")
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors")) == [*files]
    merged = load_scored_model(ModelSettings(model=str(tmp_path / "merged"))).model.state_dict()
    for name, tensor in load_file(single / "model.safetensors").items():
        torch.testing.assert_close(merged[name], (tensor + weights[name]) / 2)


def test_models_of_other_tensors_are_refused(tmp_path: Path):
    first, second = make_model(tmp_path / "a", 1), make_model(tmp_path / "b", 2, vocab_size=300)
    (tmp_path / "merged").mkdir()
    with pytest.raises(ValueError, match=r"their shapes are \[\[260, 32\], \[300, 32\]\]"):
        average_weights([first, second], tmp_path / "merged")
    tied = make_model(tmp_path / "c", 3, tied=True)
    with pytest.raises(ValueError, match=r"'lm_head.weight' is in one of them only \(1 such"):
        average_weights([first, tied], tmp_path / "merged")


OURS = {"model_type": "llama", "hidden_size": 32, "rope_theta": 1e4, "bos_token_id": 1}


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        ({}, None),
        ({"bos_token_id": 2, "torch_dtype": "bfloat16", "attention_dropout": 0.1}, None),
        ({"model_type": "mpt", "hidden_size": 64}, "its model_type is 'mpt', not 'llama'"),
        ({"hidden_size": 64}, "its hidden_size is 64, not 32"),
        ({"rope_theta": 5e5}, "its rope_theta is 500000.0, not 10000.0"),
    ],
)
def test_why_two_models_cannot_be_merged(theirs: dict[str, Any], reason: str | None):
    ours, other = (ModelFiles("", 1, None, 1, config) for config in (OURS, OURS | theirs))
    assert find_difference(ours, other) == reason


def plan(
    tmp_path: Path,
    sources: dict[str, Path],
    target: Path,
    adapters: dict[str, Path] | None = None,
    **sections: Any,
) -> Layout:
    text = tmp_path / "text.jsonl"
    if not text.exists():  # another one would be another fingerprint
        text.write_text('{"text": "The cat sat."}\n')
    recipe = {
        "storage": str(tmp_path / "store"),
        "corpus": {"documents": str(text), "max_tokens": 32},
        "target": {"model": str(target)},
        "sources": [{"name": name, "model": str(folder)} for name, folder in sources.items()],
    }
    for model, name in ((recipe["target"], "target"), *((s, s["name"]) for s in recipe["sources"])):
        if name in (adapters or {}):
            model["adapter"] = str(adapters[name])
    return plan_layout(parse_recipe(recipe | sections), ALIGN_FACTS)


def test_a_run_plans_to_merge_what_can_be_and_says_why_the_rest_cannot(tmp_path: Path):
    target = make_model(tmp_path / "target", 0)
    others = {
        "alike": make_model(tmp_path / "a", 1),
        "itself": target,
        "wider": make_model(tmp_path / "w", 2, vocab_size=300),
        "words": make_model(tmp_path / "o", 3),
    }
    save_tokenizer(byte_level_tokenizer(260), others["words"], bos=None, eos="<|end|>")
    layout = plan(tmp_path, others, target)
    assert layout.evaluation.merge.sources == ("alike",)
    assert layout.evaluation.merge.excluded == {
        "itself": "it is the target itself",
        "wider": "its vocab_size is 300, not 260",
        "words": "its tokenizer is not the target's",
    }
    own = {"target", "fused", "clm", "ensemble", "merged"}
    assert set(layout.evaluation.scores) == {*others, *own}
    lonely = plan(tmp_path, {"wider": others["wider"]}, target)
    assert lonely.evaluation.merge.folder is None
    assert set(lonely.evaluation.scores) == {
        "wider",
        "target",
        "fused",
        "clm",
    }  # one is no ensemble


def test_adapters_keep_a_model_out_of_the_mean_of_files(tmp_path: Path):
    pytest.importorskip("peft")
    target, alike = make_model(tmp_path / "target", 0), make_model(tmp_path / "a", 1)
    save_adapter(alike, tmp_path / "adapter", target_modules="all-linear")
    adapter = tmp_path / "adapter"
    layout = plan(tmp_path, {"own": alike, "plain": alike}, target, {"own": adapter})
    assert layout.evaluation.merge.sources == ("plain",)
    reason = "it has an adapter, which is not in the weight files"
    assert layout.evaluation.merge.excluded == {"own": reason}
    layout = plan(tmp_path, {"plain": alike}, target, {"target": adapter})
    reason = "the target has an adapter, which is not in the weight files"
    assert layout.evaluation.merge.excluded == {"plain": reason}


def test_sources_that_are_not_heard_are_not_in_the_ensemble(tmp_path: Path):
    folders = {name: make_model(tmp_path / name, seed) for seed, name in enumerate("abct")}
    target = folders.pop("t")
    every = plan(tmp_path, folders, target)
    some = plan(tmp_path, folders, target, fuse={"weights": {"b": 0}})
    assert list(every.evaluation.token_nll) == ["a", "b", "c"]
    assert list(some.evaluation.token_nll) == ["a", "c"]
    assert some.evaluation.scores["a"] == every.evaluation.scores["a"]
    assert some.evaluation.scores["ensemble"] != every.evaluation.scores["ensemble"]
    turned = plan(tmp_path, dict(reversed(folders.items())), target)
    assert turned.evaluation.scores["ensemble"] == every.evaluation.scores["ensemble"]
