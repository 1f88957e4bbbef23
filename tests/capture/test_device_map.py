"""A source over several devices gives the record that it gives over one.

On a CPU the second device is the disk: accelerate's hooks read its weights for each forward pass.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import dispatch_model

from rayfuse.capture.engines.transformers_engine import TransformersEngine
from rayfuse.capture.top_k import TopLogprobs
from rayfuse.config.base import UserError
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import SourceSettings
from rayfuse.models import placement
from rayfuse.models.adapter import read_adapter
from rayfuse.models.causal_lm import load_causal_lm, next_token_logprobs, split_head
from rayfuse.models.head_product import is_plain
from rayfuse.models.placement import Placement, place_model
from tests.fakes import byte_level_tokenizer, save_adapter, save_model, save_tokenizer

MAPS: dict[str, dict[str, Any]] = {
    "the second half": {
        **dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), "cpu"),
        **dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), "disk"),
    },
    "the first half": {
        **dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), "disk"),
        **dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), "cpu"),
    },
}

ROWS = [np.arange(3, 3 + length) for length in (9, 30, 17, 1)]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> SourceSettings:
    folder: Path = tmp_path_factory.mktemp("model")
    save_model("llama", 320, folder)
    save_tokenizer(byte_level_tokenizer(300), folder, bos="<|end|>", eos="<|end|>")
    if find_spec("peft"):
        save_adapter(folder, folder / "lora")
    return SourceSettings(name="s", model=str(folder), gpus=0)


def capture(source: SourceSettings, where: Placement | None) -> list[Any]:
    engine = TransformersEngine(source, CaptureSettings(signal="top_k_and_sampled_tail", top_k=5))
    engine.lm = load_causal_lm(source, "cpu", where)
    return engine.score_rows(ROWS)


@pytest.mark.parametrize("name", MAPS)
def test_record_over_two_devices_is_that_over_one(name, source):
    where = Placement(MAPS[name])
    lm = load_causal_lm(source, "cpu", where)
    assert {parameter.device.type for parameter in lm.model.parameters()} == {"cpu", "meta"}
    assert {lm.device.type, lm.head_device.type} == {"cpu"}
    for one, two in zip(capture(source, None), capture(source, where), strict=True):
        assert isinstance(one, TopLogprobs)
        np.testing.assert_array_equal(one.top_ids, two.top_ids)
        for field in ("top_logprobs", "tail_logprobs", "next_logprobs"):
            np.testing.assert_allclose(getattr(one, field), getattr(two, field), atol=1e-5)
    plain = next_token_logprobs(load_causal_lm(source, "cpu"), ROWS, 8)
    for one, two in zip(plain, next_token_logprobs(lm, ROWS, 8), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_head_that_a_hook_moves_inputs_to_is_summed_in_float32(source):
    half = source.model_copy(update={"dtype": "bfloat16"})
    first = load_causal_lm(half, "cpu", Placement(MAPS["the first half"]))
    second = load_causal_lm(half, "cpu", Placement(MAPS["the second half"]))
    assert (is_plain(first.head), is_plain(second.head)) == (True, False)
    plain, ids = load_causal_lm(half, "cpu"), torch.arange(3, 30)[None]
    with torch.no_grad():
        expected, found = (lm.logits(lm.hidden_states(ids)[0]) for lm in (plain, first))
    assert torch.equal(expected, found)


def test_adapter_is_merged_into_a_model_with_hooks_on_its_layers(source):
    pytest.importorskip("peft")
    from rayfuse.models.lora import merge_adapter

    adapted = source.model_copy(update={"adapter": f"{source.model}/lora"})
    files = read_adapter(adapted)
    model = load_causal_lm(source, "cpu").model
    names = dict.fromkeys(MAPS["the first half"], "cpu")
    hooked = merge_adapter(dispatch_model(model, names, force_hooks=True), files, "it")
    assert hasattr(hooked.model.layers[0].self_attn.q_proj, "_hf_hook")
    lm, plain = split_head(hooked, name="it"), load_causal_lm(adapted, "cpu")
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(lm.hidden_states(ids), plain.hidden_states(ids))


def test_devices_follow_the_gpus_of_the_source(source, monkeypatch):
    monkeypatch.setattr(placement.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(placement.torch.cuda, "mem_get_info", lambda gpu: (100 + gpu, 200))
    for gpus, expected in (
        (None, Placement({"": "cuda"})),
        (0.5, Placement({"": "cuda"})),
        (2, Placement("balanced", {0: 100, 1: 101})),
        (8, Placement("balanced", {0: 100, 1: 101, 2: 102, 3: 103})),
    ):
        settings = source.model_copy(update={"gpus": gpus})
        assert place_model(settings, "cuda") == expected
        assert place_model(settings, "cpu") == Placement()


def test_model_that_does_not_fit_its_gpus_is_refused_with_the_setting(source):
    model = load_causal_lm(source, "cpu", Placement(MAPS["the second half"])).model
    with pytest.raises(UserError, match=r"does not fit the 2 GPUs of its actor \(1.0, 3.0 GiB"):
        Placement("balanced", {0: 2**30, 1: 3 * 2**30}).check_fits(model, source.model)
