"""A multimodal model needs its own weights, although its text part is a causal LLM."""

import shutil
from pathlib import Path

import pytest

from rayfuse.config.base import UserError
from rayfuse.config.models import ModelSettings
from rayfuse.models.files import check_tensors
from tests.fakes import save_model
from tests.models.tiny_models import build_model, tiny_config


def test_weights_of_another_family_under_a_nested_config_are_refused(tmp_path: Path):
    build_model(tiny_config("gemma3", 320)).save_pretrained(tmp_path / "mixed")
    save_model("llama", 320, tmp_path / "llama")
    shutil.copy(tmp_path / "llama/model.safetensors", tmp_path / "mixed/model.safetensors")
    settings = ModelSettings(model=str(tmp_path / "mixed"), dtype="float32")
    with pytest.raises(UserError, match="mixed"):
        check_tensors(settings, role="source s")
