"""The planned operations of a model equal those that torch counts as it runs."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from rayfuse.config.train import TrainSettings
from rayfuse.plan.estimate import train_passes
from rayfuse.plan.model_size import size_from_config
from tests.models.tiny_models import tiny_config

ROWS, TOKENS, WIDTH = 2, 96, 64


def build(family: str):
    config = tiny_config(family, 330, width=WIDTH)
    return config, AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def count_flops(model, *, is_training: bool) -> int:
    ids = torch.randint(0, 330, (ROWS, TOKENS))
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if is_training:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_forward_pass_takes_the_planned_operations(family):
    config, model = build(family)
    size = size_from_config(copy.deepcopy(config).to_dict())
    assert size.parameters == model.num_parameters()
    planned = ROWS * TOKENS * size.forward_flops(float(TOKENS))
    # The counter takes the full square of attention, of which a causal one computes half. Norms,
    # biases and position embeddings are weights, too, of which no products are made.
    upper_half = ROWS * 2 * size.layers * size.width * TOKENS**2
    counted = count_flops(model, is_training=False) - upper_half
    assert counted <= planned
    spare = sum(tensor.numel() for tensor in model.parameters() if tensor.dim() < 2)
    spare += 512 * size.width if family == "gpt2" else 0
    assert planned - counted == pytest.approx(2 * ROWS * TOKENS * spare, abs=1)


def test_a_training_step_takes_three_forward_passes_and_four_with_checkpointing():
    _, model = build("llama")
    model.train()
    forward = count_flops(model, is_training=False)
    assert count_flops(model, is_training=True) / forward == pytest.approx(
        train_passes(TrainSettings()), rel=0.02
    )
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    passes = count_flops(model, is_training=True) / forward
    head = 2 * ROWS * TOKENS * 330 * WIDTH / forward  # it is not computed again
    planned = train_passes(TrainSettings(gradient_checkpointing=True))
    assert passes == pytest.approx(planned - head, rel=0.05)
