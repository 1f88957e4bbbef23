"""Models whose text part is nested: Gemma 3 with vision."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from rayfuse.config.base import UserError
from rayfuse.config.models import ModelSettings
from rayfuse.models.causal_lm import load_causal_lm
from rayfuse.models.files import check_model, check_tensors
from tests.fakes import byte_level_tokenizer, save_model, save_tokenizer


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    """A multimodal model: its text part is nested in config.json and in the names of tensors."""
    text = {
        "vocab_size": 320,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 16,
        "max_position_embeddings": 64,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    folder = tmp_path_factory.mktemp("gemma3")
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    save_tokenizer(byte_level_tokenizer(300), folder, bos="<|end|>", eos="<|end|>")
    return folder


def test_the_text_part_of_a_multimodal_model_gives_its_log_probabilities(gemma):
    settings = ModelSettings(model=str(gemma), dtype="float32")
    check_model(settings, 32, role="source")
    lm = load_causal_lm(settings, "cpu")
    ids = torch.arange(1, 9)[None]
    logprobs = lm.logits(lm.hidden_states(ids)[0]).log_softmax(1)
    complete = Gemma3ForConditionalGeneration.from_pretrained(gemma).eval()
    with torch.no_grad():
        expected = complete(input_ids=ids).logits[0].log_softmax(1)
    torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-4)


def test_weights_of_another_family_under_a_nested_config_are_refused(gemma, tmp_path):
    folder = shutil.copytree(gemma, tmp_path / "mixed")
    save_model("llama", 320, tmp_path / "llama")
    shutil.copy(tmp_path / "llama/model.safetensors", folder / "model.safetensors")
    settings = ModelSettings(model=str(folder), dtype="float32")
    with pytest.raises(UserError, match="mixed"):
        check_tensors(settings, role="source s")
