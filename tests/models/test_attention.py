"""Attention over packed rows: sequences joined to one, what is installed, and what leaks."""

import importlib
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from rayfuse.models.attention import has_flash_attention, prepare_packing, uses_flash_attention
from rayfuse.models.causal_lm import CausalLM, keeps_rows_apart, split_head
from tests.fakes import tiny_config


def make_lm(family: str = "llama") -> CausalLM:
    torch.manual_seed(0)
    return split_head(AutoModelForCausalLM.from_config(tiny_config(family, 60)).eval(), name=family)


def test_joined_sequences_have_the_hidden_states_and_gradients_of_stacked_ones():
    lm = make_lm()
    joined = replace(lm, joins_sequences=True)
    token_ids = torch.randint(60, (2, 10))
    rows = [[3, 5], [7, 1]]  # two tokens of padding follow the rows of each sequence
    positions = [torch.cat([*map(torch.arange, lengths), torch.zeros(2)]) for lengths in rows]
    position_ids = torch.stack(positions).long()
    results = []
    for chosen in (lm, joined):
        hidden = chosen.hidden_states(token_ids, position_ids)[:, :8]
        lm.model.zero_grad()
        hidden.square().mean().backward()
        results.append((hidden, [p.grad for p in lm.body.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(joined.hidden_states(token_ids), lm.hidden_states(token_ids))


class AlonePositions(nn.Module):
    """A body that reads where rows begin in a batch of one alone, as FlashAttention does."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, input_ids: torch.Tensor, position_ids=None, **named):
        if position_ids is not None and len(input_ids) > 1:
            # The mask is that of one row; the positions themselves are kept.
            seen = torch.ones_like(input_ids)
            return self.body(input_ids, position_ids=position_ids, attention_mask=seen, **named)
        return self.body(input_ids, position_ids=position_ids, **named)


def test_rows_that_are_apart_in_a_batch_of_one_alone_are_seen_to_leak_unless_joined():
    lm = make_lm()
    leaking = replace(lm, body=AlonePositions(lm.body))
    assert keeps_rows_apart(lm)
    assert not keeps_rows_apart(leaking)
    assert keeps_rows_apart(replace(leaking, joins_sequences=True))


@pytest.mark.parametrize(("family", "expected"), [("llama", True), ("mpt", False)])
def test_on_a_cpu_the_model_stays_as_it_is(family, expected):
    lm = make_lm(family)
    before = lm.model.config._attn_implementation
    assert prepare_packing(lm, pack=True) == (lm, expected)
    assert prepare_packing(lm, pack=False) == (lm, False)
    assert lm.model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("found", "expected"),
    [("2.8.3", True), ("2.3.3", True), ("2.8.0.post2", True), ("2.3.2", False), ("1.0", False)],
)
def test_flash_attention_must_be_installed_in_a_version_that_the_library_uses(
    tmp_path, monkeypatch, found, expected
):
    """Install a package of this name and version that holds nothing."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn/__init__.py").touch()
    info = tmp_path / f"flash_attn-{found}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {found}\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert has_flash_attention() is expected
    assert not uses_flash_attention(make_lm())  # neither on a GPU nor in half precision
    assert "flash_attn" not in sys.modules


@pytest.mark.gpu
@pytest.mark.skipif(
    not (torch.cuda.is_available() and has_flash_attention()), reason="no GPU, or no flash-attn"
)
def test_flash_attention_is_chosen_on_a_gpu_and_has_the_gradients_of_the_default():
    torch.manual_seed(0)
    config = tiny_config("llama", 60)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to("cuda")
    lm = split_head(model.eval(), name="llama")
    token_ids = torch.randint(60, (2, 16), device="cuda")
    position_ids = torch.arange(8, device="cuda").repeat(2, 2)
    grads = []
    for choose in (lambda: lm, lambda: prepare_packing(lm, pack=True)[0]):
        model.zero_grad()
        choose().hidden_states(token_ids, position_ids).float().square().sum().backward()
        grads.append(torch.cat([p.grad.flatten().float() for p in lm.body.parameters()]))
    assert model.config._attn_implementation == "flash_attention_2"
    assert (grads[1] - grads[0]).norm() < 0.02 * grads[0].norm()
