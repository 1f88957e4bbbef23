"""Folders of models are merged tensor by tensor, in bounded memory, or refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rayfuse.config.base import UserError
from rayfuse.config.merge import METHODS, MergeSettings
from rayfuse.merge.streamed import merge_folders
from rayfuse.models.host_memory import MERGED_TENSORS
from rayfuse.models.tokenizer import load_tokenizer
from tests.fakes import byte_level_tokenizer, save_tokenizer
from tests.merge.folders import make_model, make_pivot, write
from tests.merge.formulas import FORMULAS

SETTINGS = MergeSettings(weights={"a": 1.0, "b": 3.0}, t=0.3, scale=0.4, density=0.5, tau=0.3)


def merge(
    folder: Path, pivot: Path, models: dict[str, Path], method: str, **changes: Any
) -> dict[str, torch.Tensor]:
    """Merge into a new folder, and read its weights."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    settings = SETTINGS.model_copy(update=changes)
    merge_folders(models, pivot, folder, method=method, settings=settings)
    return {
        k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()
    }


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    pivot = make_pivot(tmp_path / "pivot")
    return {name: make_model(pivot, tmp_path / name, ord(name)) for name in "ab"}


@pytest.mark.parametrize("method", [*FORMULAS])
def test_each_tensor_of_a_merged_model_is_the_formula_in_float64(
    tmp_path: Path, models: dict[str, Path], method: str
):
    merged = merge(tmp_path / "merged", tmp_path / "pivot", models, method)
    base = load_file(tmp_path / "pivot" / "model.safetensors")
    parts = [load_file(folder / "model.safetensors") for folder in models.values()]
    names = METHODS[method].settings
    settings = {name: getattr(SETTINGS, name) for name in names} | (
        {"weights": (1.0, 3.0)} if "weights" in names else {}
    )
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        arrays = [part[name].double().numpy() for part in (base, *parts)]
        expected = FORMULAS[method](arrays[0], arrays[1:], **settings)
        np.testing.assert_allclose(tensor.double().numpy(), expected, rtol=1e-6, atol=1e-7)
        assert not torch.equal(tensor, base[name]) or method == "sce", name
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizers = {load_tokenizer(str(tmp_path / name)).content_hash for name in ("merged", "a")}
    assert len(tokenizers) == 1


def test_each_model_and_tensor_has_other_dropped_elements_whatever_the_order(
    tmp_path: Path, models: dict[str, Path]
):
    pivot = tmp_path / "pivot"
    first = merge(tmp_path / "1", pivot, models, "dare")
    turned = merge(tmp_path / "2", pivot, dict(reversed(models.items())), "dare")
    other = merge(tmp_path / "3", pivot, models, "dare", seed=1)
    base = load_file(pivot / "model.safetensors")
    kept = []
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, turned[name])  # the order of a sum differs
        assert not torch.equal(tensor, other[name]) or tensor.dim() < 2, name
        kept.append((tensor != base[name]).double().mean())
    assert all(0.4 < share <= 1 for share in kept)
    assert abs(float(sum(kept) / len(kept)) - 0.75) < 0.05  # of two models, each keeps half
    one, two = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qo")
    assert not torch.equal(first[one] == base[one], first[two] == base[two])


def test_a_pivot_that_nothing_changes_is_returned_with_all_its_bytes(tmp_path: Path):
    pivot = make_pivot(tmp_path / "pivot", dtype=torch.bfloat16)
    weights = load_file(pivot / "model.safetensors")
    weights["steps"] = torch.tensor([7, 8])  # no weight: kept as it is
    write(pivot / "model.safetensors", weights)
    for method in METHODS:
        merge(tmp_path / "merged", pivot, {"a": pivot, "b": pivot}, method)
        for file in pivot.iterdir():
            assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes(), method


def test_the_linear_merge_of_one_model_is_that_model(tmp_path: Path, models: dict[str, Path]):
    merge(tmp_path / "merged", tmp_path / "pivot", {"a": models["a"]}, "linear")
    merged, own = (tmp_path / name / "model.safetensors" for name in ("merged", "a"))
    assert merged.read_bytes() == own.read_bytes()


def test_rounding_the_pivot_to_the_dtype_of_training_is_no_change(tmp_path: Path):
    """A float32 target that is trained in bfloat16 changes by rounding where no gradient was."""
    pivot = make_pivot(tmp_path / "pivot")
    model = make_model(pivot, tmp_path / "a", 1, step=0.0)
    path = model / "model.safetensors"
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    write(path, rounded)
    for method in METHODS:
        merged = merge(tmp_path / "merged", pivot, {"a": model, "b": model}, method)
        assert all(torch.equal(merged[name], tensor) for name, tensor in rounded.items()), method


def test_tied_and_sharded_models_keep_their_files(tmp_path: Path):
    pivot = make_pivot(tmp_path / "pivot", tied=True)
    models = {name: make_model(pivot, tmp_path / name, ord(name)) for name in "ab"}
    expected = merge(tmp_path / "single", pivot, models, "ties")
    assert "lm_head.weight" not in expected
    for folder in models.values():
        split(folder)
    merged = merge(tmp_path / "merged", pivot, models, "ties")
    files = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    assert files == ["model-1.safetensors", "model-2.safetensors"]
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    embeddings = loaded.get_input_embeddings().weight
    assert torch.equal(embeddings, expected["model.embed_tokens.weight"])
    assert loaded.lm_head.weight is embeddings


def split(folder: Path) -> None:
    """Divide a model's file in two, with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    places = {name: f"model-{1 + (i >= 5)}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        write(folder / file, {name: weights[name] for name in names if places[name] == file})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_target_may_hold_tensors_that_training_does_not_save(
    tmp_path: Path, models: dict[str, Path]
):
    pivot = tmp_path / "pivot"
    expected = merge(tmp_path / "expected", pivot, models, "sce")
    weights = load_file(pivot / "model.safetensors")
    write(pivot / "model.safetensors", weights | {"inv_freq": torch.ones(4)})
    merged = merge(tmp_path / "merged", pivot, models, "sce")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


def change_weights(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    weights = load_file(folder / "model.safetensors")
    if tensor is None:
        del weights[name]
    else:
        weights[name] = tensor
    write(folder / "model.safetensors", weights)


@pytest.mark.parametrize(
    ("folder", "tensor", "message"),
    [
        ("b", None, "'model.norm.weight' is in one of them only (1 such tensors)"),
        ("b", torch.ones(33), "'model.norm.weight' is F32 [33], not F32 [32]"),
        ("b", torch.ones(32).half(), "'model.norm.weight' is F16 [32], not F32 [32]"),
        ("pivot", None, "lacks 'model.norm.weight' (1 such tensors)"),
        ("pivot", torch.ones(4, 8), "'model.norm.weight' is F32 [4, 8], and F32 [32] in the fused"),
        ("pivot", torch.ones(32).int(), "'model.norm.weight' is I32 [32], and F32 [32] in the"),
    ],
)
def test_models_of_other_tensors_are_refused(
    tmp_path: Path,
    models: dict[str, Path],
    folder: str,
    tensor: torch.Tensor | None,
    message: str,
):
    change_weights(tmp_path / folder, "model.norm.weight", tensor)
    with pytest.raises(UserError, match=re.escape(message)):
        merge(tmp_path / "merged", tmp_path / "pivot", models, "linear")
    assert not [*(tmp_path / "merged").iterdir()]


def test_models_of_other_tokenizers_are_refused(tmp_path: Path, models: dict[str, Path]):
    save_tokenizer(byte_level_tokenizer(258), models["b"], bos=None, eos="<|end|>")
    with pytest.raises(UserError, match="cannot be merged: their tokenizers differ"):
        merge(tmp_path / "merged", tmp_path / "pivot", models, "linear")


def test_an_incomplete_file_is_refused(tmp_path: Path, models: dict[str, Path]):
    path = models["b"] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"b/model.safetensors is incomplete or no safetensors"):
        merge(tmp_path / "merged", tmp_path / "pivot", models, "linear")


def test_weights_that_are_all_zero_are_refused(tmp_path: Path, models: dict[str, Path]):
    with pytest.raises(UserError, match=r"merge\.weights gives each of a, b the weight 0"):
        merge(tmp_path / "m", tmp_path / "pivot", models, "linear", weights={"a": 0, "b": 0})


NUM_TENSORS, TENSOR_BYTES = 24, 2 << 20

MEASURE = """
import json, sys
from pathlib import Path
from rayfuse.config.merge import METHODS, MergeSettings
from rayfuse.merge.streamed import merge_folders

def read_peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

def merge(kind, method):
    root = Path(sys.argv[1], kind)
    models = {name: root / name for name in ("ab" if method == "slerp" else "abc")}
    merged = root / f"merged-{method}"
    merged.mkdir()
    merge_folders(models, root / "pivot", merged, method=method, settings=MergeSettings())

peaks = {}
for method in METHODS:
    merge("small", method)  # what is imported and opened once is no memory of tensors
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = read_peak()
    merge("large", method)
    peaks[method] = read_peak() - before
print(json.dumps(peaks))
"""


def write_large_models(root: Path) -> None:
    """Write a target and three models of 24 tensors of 2 MiB each, and as many tiny ones."""
    for kind, count, rows in (("small", 1, 1), ("large", NUM_TENSORS, TENSOR_BYTES // 4096)):
        for seed, name in enumerate(("pivot", "a", "b", "c")):
            random = torch.Generator().manual_seed(seed)
            folder = root / kind / name
            folder.mkdir(parents=True)
            (folder / "tokenizer.json").write_text("{}")
            tensors = {f"{i}": torch.randn(rows, 1024, generator=random) for i in range(count)}
            write(folder / "model.safetensors", tensors)


def test_the_peak_of_memory_is_a_few_tensors_of_each_model(tmp_path: Path):
    write_large_models(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        # Freed tensors return to the system, as those above 32 MiB always do.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )
    peaks = {method: peak / TENSOR_BYTES for method, peak in json.loads(done.stdout).items()}
    print({method: round(peak, 1) for method, peak in peaks.items()})
    # One of each of three models and of the pivot, and what a formula needs besides; a merge of
    # complete models would hold 24 of each.
    assert max(peaks.values()) < 3 + MERGED_TENSORS
    assert max(peaks["linear"], peaks["task_arithmetic"]) < 6  # one model at a time
