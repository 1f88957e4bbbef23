"""Every family of the table: its numbers are the model's own, or it is refused with a reason."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaModel

from docs import models_table
from docs.models_table import PAGE, read_rows, render_family, render_refused
from rayfuse.capture.engines.transformers_engine import score_with
from rayfuse.config.base import UserError
from rayfuse.config.models import ModelSettings
from rayfuse.models import causal_lm
from rayfuse.models.causal_lm import LogitTransform, split_head
from rayfuse.models.config_file import read_config
from rayfuse.models.files import check_tensors, forget_model_files
from rayfuse.models.refused import REFUSED
from tests.fakes import byte_level_tokenizer, copy_tokenizer, save_tokenizer
from tests.models.families import FAMILIES, REFUSED_FAMILIES
from tests.models.family_checks import (
    HEAD_WIDTH,
    MAX_GRADIENT_ERROR,
    MAX_SOURCE_ERROR,
    SETTINGS,
    TOKENS,
    load_engine,
    measure_family,
    measure_source_error,
    measure_target_errors,
    refuse_family,
)
from tests.models.tiny_models import build_model, tiny_config

BY_CONFIG_ALONE = {"bart", "mllama", "t5", "vit"}
"""Refused families that have no forward pass of a causal LLM, or a right one."""


@pytest.fixture(autouse=True)
def one_thread(tmp_path, monkeypatch) -> Iterator[None]:
    """Use one thread, which is faster for tiny models, and no result of an earlier run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(byte_level_tokenizer(TOKENS), folder, bos="<|end|>", eos="<|end|>")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_records_losses_and_gradients_are_those_of_the_models_own_logits(
    family, tokenizer, tmp_path
):
    measured = measure_family(family, tokenizer, tmp_path / "model")
    assert measured.is_source, measured
    assert measured.is_target, measured
    row = render_family(family, measured)
    assert row in read_rows(PAGE.read_text(), models_table.USED), (
        "run `python -m docs.models_table`"
    )


def test_families_are_refused_by_their_configs_with_the_errors_of_the_page(tmp_path):
    errors = {name: refuse_family(name, tmp_path / name) for name in REFUSED_FAMILIES}
    rows = read_rows(PAGE.read_text(), models_table.REFUSED)
    assert rows == render_refused(errors), "run `python -m docs.models_table`"


def test_the_page_has_no_other_families():
    assert len(read_rows(PAGE.read_text(), models_table.USED)) == len(FAMILIES)
    assert not FAMILIES.keys() & REFUSED_FAMILIES.keys()
    assert REFUSED.keys() == REFUSED_FAMILIES.keys() - (BY_CONFIG_ALONE - {"mllama"})


@pytest.mark.parametrize("model_type", sorted(REFUSED_FAMILIES.keys() - BY_CONFIG_ALONE))
def test_a_family_that_is_refused_by_name_would_give_wrong_values(model_type):
    changes = REFUSED_FAMILIES[model_type]
    with pytest.raises(UserError, match=r"not its head applied|tokens that come after them"):
        split_head(build_model(tiny_config(model_type, HEAD_WIDTH, **changes)), name="it")


@pytest.mark.parametrize("model_type", [name for name in REFUSED if REFUSED[name].unless])
def test_a_refused_family_is_accepted_with_the_key_that_makes_it_causal(model_type, tmp_path):
    changes = REFUSED_FAMILIES[model_type] | {str(REFUSED[model_type].unless): True}
    model = build_model(tiny_config(model_type, HEAD_WIDTH, **changes))
    split_head(model, name="it")
    model.save_pretrained(tmp_path)
    read_config(ModelSettings(model=str(tmp_path)))


def test_a_trained_mllama_could_not_be_loaded(tmp_path):
    text = {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 64, "pad_token_id": None}
    config = tiny_config("mllama", 64, text_config=text)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no causal LLM"):
        check_tensors(ModelSettings(model=str(tmp_path)), role="target")


def test_a_model_without_a_head_is_refused():
    body = LlamaModel(tiny_config("llama", HEAD_WIDTH))
    with pytest.raises(UserError, match="a LlamaModel, which has no linear head on top of a body"):
        split_head(body, name="it")


def test_a_hub_model_is_refused_by_its_config_without_its_weights(tmp_path, monkeypatch):
    """From the hub's cache, as `HF_HUB_OFFLINE` is set."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("llama", "vit", "bert"):
        folder = tmp_path / f"models--own--{name}"
        config = tiny_config(name, HEAD_WIDTH)
        config.update({"vocab_size": HEAD_WIDTH})
        config.save_pretrained(folder / "snapshots" / "abc")
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text("abc")
    forget_model_files()
    check_tensors(ModelSettings(model="own/llama"), role="target")
    with pytest.raises(UserError, match=r"source s: model is 'own/vit', of model_type 'vit'"):
        check_tensors(ModelSettings(model="own/vit"), role="source s")
    with pytest.raises(UserError, match="model_type is 'bert'"):
        check_tensors(ModelSettings(model="own/bert"), role="source s")


def test_the_checks_see_a_wrong_scale_a_wrong_cap_and_rows_that_see_each_other(tokenizer, tmp_path):
    model = build_model(tiny_config("gpt_oss", HEAD_WIDTH))
    model.save_pretrained(tmp_path)
    copy_tokenizer(tokenizer, tmp_path)
    engine = load_engine(tmp_path)
    assert measure_target_errors(engine.lm, model, is_packed=True)[1] > 10 * MAX_GRADIENT_ERROR
    for transform in (LogitTransform(1.01), LogitTransform(1.0, 30.0)):
        lm = replace(engine.lm, transform=transform)
        engine.batches = score_with(lm, engine.known_ids, SETTINGS, salt="")
        assert measure_source_error(engine, model) > 10 * MAX_SOURCE_ERROR


def test_a_cap_under_an_unknown_key_is_refused_even_if_no_logit_reaches_it(monkeypatch):
    model = build_model(tiny_config("xlstm", HEAD_WIDTH))
    assert split_head(model, name="it").transform.cap == 30
    monkeypatch.setattr(causal_lm, "CAP_KEYS", ())
    with pytest.raises(UserError, match="not its head applied"):
        split_head(model, name="it")
