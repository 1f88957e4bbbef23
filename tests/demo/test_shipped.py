"""The shipped models are those of the specs, and no demo evaluates on text that they have seen."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rayfuse.config.base import UserError
from rayfuse.config.models import ModelSettings
from rayfuse.demo import shipped
from rayfuse.demo.specs import SOURCES, TARGET, ModelSpec
from rayfuse.demo.stage import prepare_demo
from rayfuse.demo.text import (
    MIN_BLOCK_CHARS,
    SIZES,
    Document,
    SeenText,
    collect_domains,
    describe_seen,
    hash_paragraph,
    split_documents,
    write_documents,
)
from rayfuse.models.causal_lm import load_causal_lm
from rayfuse.models.tokenizer import load_tokenizer
from rayfuse.runtime.progress import report_nothing

SPECS = (*SOURCES, TARGET)


def list_long_paragraphs(documents: list[Document]) -> set[bytes]:
    joined = (" ".join(block.split()) for each in documents for block in each.text.split("\n\n"))
    return {hash_paragraph(block) for block in joined if len(block) >= MIN_BLOCK_CHARS}


def test_they_are_small():
    files = [file for file in shipped.FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= shipped.MAX_BYTES


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_they_have_the_shape_of_their_spec(spec: ModelSpec):
    folder = str(shipped.FOLDER / spec.name)
    lm = load_causal_lm(ModelSettings(model=folder), "cpu")
    config = lm.model.config
    assert lm.head.weight.shape == (spec.head_width, spec.width)
    assert config.num_hidden_layers == spec.layers
    assert config.model_type == {"neox": "gpt_neox"}.get(spec.family, spec.family)
    assert load_tokenizer(folder).vocab_size <= spec.vocab_size


@pytest.mark.parametrize("seed", [0, 1])
def test_no_group_and_no_paragraph_of_corpus_and_held_out_text_was_seen(seed: int):
    seen = shipped.read_seen_text()
    sizes = {domain: replace(size, pretrain=0) for domain, size in SIZES.items()}
    parts = split_documents(collect_domains(shipped.SEED, seen), seed, sizes)
    assert not parts.pretrain
    assert len(seen.groups) > 100 and len(seen.paragraphs) > 5_000
    for part in (parts.corpus, parts.held_out):
        assert not {f"{document.domain}/{document.group}" for document in part} & seen.groups
        assert not list_long_paragraphs([*part]) & seen.paragraphs


def test_text_that_moved_to_another_module_stays_seen():
    everything = collect_domains(shipped.SEED)
    moved = everything["code"][100:140]
    seen = SeenText(paragraphs=describe_seen(moved).paragraphs)
    rest = collect_domains(shipped.SEED, seen)["code"]
    assert list_long_paragraphs(everything["code"]) & seen.paragraphs
    assert not list_long_paragraphs(rest) & seen.paragraphs


def test_a_demo_copies_them_without_a_cluster_and_rewrites_nothing(tmp_path: Path):
    path = prepare_demo(str(tmp_path), 0, report_nothing)
    recipe = yaml.safe_load(path.read_text())
    models = [recipe["target"]["model"], *(source["model"] for source in recipe["sources"])]
    files = [Path(model) / name for model in models for name in shipped.MODEL_FILES]
    before = [file.stat().st_mtime_ns for file in files]
    assert sorted(Path(model).name for model in models) == sorted(spec.name for spec in SPECS)
    prepare_demo(str(tmp_path), 0, report_nothing)
    assert [file.stat().st_mtime_ns for file in files] == before
    (files[0]).write_bytes(b"{}")
    prepare_demo(str(tmp_path), 0, report_nothing)
    assert files[0].read_bytes() != b"{}"


def test_a_copy_of_rayfuse_without_models_names_the_remedy(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "missing")
    with pytest.raises(UserError, match=r"are not in this copy of rayfuse .* use --train-models"):
        prepare_demo(str(tmp_path), 0, report_nothing)


def copy_as_trained(folder: Path, held_out: list[Document]) -> None:
    """Lay out the shipped models as `rayfuse demo --train-models` does."""
    for spec in SPECS:
        shutil.copytree(shipped.FOLDER / spec.name, folder / "demo" / spec.name)
    write_documents(held_out, folder / "demo/held_out.jsonl")


def test_packed_models_replace_the_shipped_ones(tmp_path: Path, monkeypatch):
    parts = split_documents(collect_domains(shipped.SEED), shipped.SEED)
    copy_as_trained(tmp_path, [*parts.held_out])
    before = shipped.FOLDER
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "package/models")
    (tmp_path / "package").mkdir()
    shipped.pack(tmp_path)
    assert shipped.read_seen_text() == describe_seen(parts.pretrain)
    for spec in SPECS:
        name = f"{spec.name}/model.safetensors"
        packed = load_file(shipped.FOLDER / name)
        assert all(
            torch.equal(packed[key], value) for key, value in load_file(before / name).items()
        )


def test_models_of_another_split_or_incomplete_ones_are_not_packed(tmp_path: Path, monkeypatch):
    other = split_documents(collect_domains(shipped.SEED), shipped.SEED + 1).held_out
    copy_as_trained(tmp_path / "other", [*other])
    package = tmp_path / "package/models"
    package.mkdir(parents=True)
    (package / "kept").touch()
    monkeypatch.setattr(shipped, "FOLDER", package)
    with pytest.raises(ValueError, match="have another split of the text than seed 0"):
        shipped.pack(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        shipped.pack(tmp_path / "missing")
    assert [file.name for file in package.iterdir()] == ["kept"]


@pytest.mark.ray
def test_models_can_be_trained_afresh_and_are_reused(ray_cluster, tmp_path: Path):
    specs = [
        replace(spec, width=32, layers=1, steps=2, vocab_size=400, head_width=448)
        for spec in (SOURCES[0], TARGET)
    ]
    path = prepare_demo(str(tmp_path), 3, report_nothing, specs, train_models=True)
    recipe = yaml.safe_load(path.read_text())
    models = [Path(recipe["target"]["model"]), Path(recipe["sources"][0]["model"])]
    assert [model.name for model in models] == [TARGET.name, SOURCES[0].name]
    before = [(model / "model.safetensors").stat().st_mtime_ns for model in models]
    prepare_demo(str(tmp_path), 3, report_nothing, specs, train_models=True)
    assert [(model / "model.safetensors").stat().st_mtime_ns for model in models] == before
