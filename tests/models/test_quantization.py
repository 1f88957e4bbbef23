"""Quantised models: sources alone, and a missing library is an error before anything starts."""

import json
from pathlib import Path

import pytest

from rayfuse.config.base import UserError
from rayfuse.config.load import parse_recipe
from rayfuse.config.models import ModelSettings, SourceSettings
from rayfuse.models import quantization
from rayfuse.models.files import check_model, forget_model_files
from rayfuse.models.tokenizer import load_tokenizer
from tests.fakes import byte_level_tokenizer, save_model, save_tokenizer
from tests.run.test_folder_names import BASE


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model("llama", 320, folder)
    save_tokenizer(byte_level_tokenizer(300), folder, bos="<|end|>", eos="<|end|>")
    return folder


@pytest.fixture(autouse=True)
def installed(monkeypatch) -> set[str]:
    """The libraries that count as installed; none at first."""
    names: set[str] = set()
    monkeypatch.setattr(quantization, "find_spec", lambda name: name if name in names else None)
    forget_model_files()
    load_tokenizer.cache_clear()
    return names


def set_method(folder: Path, method: str | None) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("quantization_config", None)
    extra = {} if method is None else {"quantization_config": {"quant_method": method}}
    path.write_text(json.dumps(config | extra))
    forget_model_files()


@pytest.mark.parametrize(
    ("dtype", "method", "library"),
    [
        ("float8", None, "torchao"),
        ("int8", None, "bitsandbytes"),
        ("int4", None, "bitsandbytes"),
        ("auto", "gptq", "gptqmodel"),
        ("auto", "compressed-tensors", "compressed_tensors"),
        ("auto", "torchao", "torchao"),
    ],
)
def test_missing_library_is_named_with_its_package(dtype, method, library, folder, installed):
    set_method(folder, method)
    source = SourceSettings(name="s", model=str(folder), dtype=dtype)
    with pytest.raises(UserError, match=f"source s: .*needs {library}; pip install"):
        check_model(source, 64, role="source s")
    installed.add(library)
    assert check_model(source, 64, role="source s").head_width == 320


def test_methods_without_a_library_of_their_own_are_left_to_transformers(folder):
    set_method(folder, "fp8")
    check_model(SourceSettings(name="s", model=str(folder)), 64, role="source s")


def test_quantised_target_is_refused(folder):
    set_method(folder, "gptq")
    with pytest.raises(UserError, match=r"target: .* quantised \(gptq\); a target is trained"):
        check_model(ModelSettings(model=str(folder)), 64, role="target")
    with pytest.raises(ValueError, match="dtype is int8, in which nothing can be trained"):
        parse_recipe(BASE | {"target": {"model": "m", "dtype": "int8"}, "storage": "/run"})


def test_quantised_twice_or_with_an_adapter_or_in_vllm_is_refused(folder):
    source = SourceSettings(name="s", model="m", dtype="int4")
    with pytest.raises(UserError, match=r"quantised already \(gptq\), but dtype is int4"):
        quantization.check_quantization(source, {"quantization_config": {"quant_method": "gptq"}})
    adapted = source.model_copy(update={"adapter": "lora"})
    with pytest.raises(UserError, match=r"\(int4\), so that adapter 'lora' cannot be merged"):
        quantization.check_quantization(adapted, {})
    with pytest.raises(ValueError, match="dtype is int4, by which backend vllm does not quantise"):
        SourceSettings(name="s", model="m", dtype="int4", backend="vllm")
