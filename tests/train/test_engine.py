"""What reaches the engine, and targets with adapters."""

import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rayfuse.config.train import LoraSettings, TrainSettings
from rayfuse.models.causal_lm import split_head
from rayfuse.train.batches import Packing, Step, build_micro_batches
from rayfuse.train.deepspeed_engine import build_engine, save_model
from rayfuse.train.loop import Objective, StepMetrics, measure_bits_per_byte, train_steps
from rayfuse.train.model import FusionModel
from rayfuse.train.throughput import ThroughputMeter
from tests.models.tiny_models import tiny_config
from tests.train.test_batches import VOCAB, random_rows

of_zero_3 = pytest.mark.filterwarnings("ignore:.*torch.distributed.* is deprecated:FutureWarning")


def start_engine(
    settings: TrainSettings, family: str = "llama", num_steps: int = 10, **changes: Any
):
    torch.manual_seed(0)
    config = tiny_config(family, VOCAB)
    dtype = changes.pop("dtype", torch.float32)
    config.update(changes)
    lm = split_head(AutoModelForCausalLM.from_config(config).to(dtype), name=family)
    lm.model.train()
    model = FusionModel(lm, settings, num_sources=2)
    return build_engine(model, settings, num_steps=num_steps, num_workers=1, device="cpu")


def make_steps(num_steps: int, *, num_rows: int = 6) -> list[Step]:
    return [
        Step(build_micro_batches(random_rows(num_rows, seed), Packing(40, 1, True)), str(seed))
        for seed in range(num_steps)
    ]


def train(
    engine,
    settings: TrainSettings,
    num_steps: int,
    seen: list[StepMetrics] | None = None,
    *,
    first_step: int = 0,
    seed: int = 0,
) -> list[StepMetrics]:
    seen = [] if seen is None else seen
    train_steps(
        engine,
        iter(make_steps(num_steps)[first_step:]),
        Objective(settings.clm_weight, settings.temperature, num_steps, ("a", "b")),
        first_step=first_step,
        num_workers=1,
        after_step=seen.append,
        seed=seed,
    )
    return seen


def test_every_setting_of_adamw_and_its_schedule_reaches_the_engine(process_group):
    settings = TrainSettings(
        learning_rate=3e-3,
        betas=(0.8, 0.9),
        epsilon=1e-5,
        weight_decay=0.3,
        gradient_clipping=0.7,
        warmup_share=0.2,
        final_learning_rate_share=0.1,
        schedule="linear",
    )
    engine = start_engine(settings)
    assert engine.gradient_clipping() == 0.7
    matrices, vectors = engine.optimizer.param_groups
    for group, decay in ((matrices, 0.3), (vectors, 0.0)):
        assert group["betas"] == (0.8, 0.9)
        assert group["eps"] == 1e-5
        assert group["weight_decay"] == decay
    rates = [metrics.learning_rate for metrics in train(engine, settings, 10)]
    falling = [3e-3 * (1 - 0.9 * done / 8) for done in range(8)]
    assert rates == pytest.approx([1.5e-3, 3e-3, *falling])


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_training_compiles_nothing_also_with_offload(
    zero_stage, process_group, tmp_path, monkeypatch
):
    """Images of nodes seldom have a compiler, by which DeepSpeed builds its own operators."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    for name in ("CC", "CXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    settings = TrainSettings(zero_stage=zero_stage, offload=zero_stage > 0)
    seen = train(start_engine(settings), settings, 3)
    assert len(seen) == 3
    assert not (tmp_path / "extensions").exists()


def test_lambda_and_temperature_follow_their_ramps(process_group):
    settings = TrainSettings.model_validate(
        {"lambda": {"start": 0.9, "end": 0.1}, "temperature": {"start": 1, "end": 3}}
    )
    seen = train(start_engine(settings), settings, 5)
    assert [metrics.clm_weight for metrics in seen] == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1])
    assert [metrics.temperature for metrics in seen] == pytest.approx([1, 1.5, 2, 2.5, 3])
    for metrics in seen:
        assert set(metrics.source_losses) == set(metrics.source_shares) == {"a", "b"}
        assert sum(metrics.source_shares.values()) == pytest.approx(1)
        assert metrics.tokens_per_second > 0
        assert metrics.flops_per_second > 0
        assert metrics.gradient_norm > 0


@of_zero_3
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_fault_20_a_step_that_is_not_finite_is_skipped_and_counted(
    fault, zero_stage, process_group
):
    settings = TrainSettings(learning_rate=1e-2, zero_stage=zero_stage)
    engine = start_engine(settings)
    seen: list[StepMetrics] = []
    weights: dict[int, torch.Tensor] = {}
    embedding = engine.module.lm[0].model.get_input_embeddings()
    forward = embedding.forward

    def forward_with_a_fault_in_step_3(*args: Any) -> torch.Tensor:
        weights[len(seen)] = engine.module.head_loss.weight.detach().clone()
        hidden = forward(*args)
        if len(seen) == 2 and fault == "loss":
            return hidden * float("inf")
        if len(seen) == 2:
            hidden.register_hook(lambda gradient: gradient * float("nan"))
        return hidden

    embedding.forward = forward_with_a_fault_in_step_3
    train(engine, settings, 5, seen)
    assert [metrics.is_skipped for metrics in seen] == [False, False, True, False, False]
    assert (seen[2].loss is None) == (fault == "loss")
    assert seen[2].gradient_norm is None
    assert all(metrics.loss is not None for metrics in seen[3:])
    changed = [not torch.equal(weights[step], weights[step + 1]) for step in range(4)]
    assert changed == [True, True, False, True]
    again = train(start_engine(settings), settings, 5)
    assert [metrics.learning_rate for metrics in seen] == [
        metrics.learning_rate for metrics in again
    ]


def test_fault_20_several_such_steps_in_a_row_stop_the_run_with_the_weights_untouched(
    process_group,
):
    settings = TrainSettings(learning_rate=1e-2)
    engine = start_engine(settings)
    with torch.no_grad():
        engine.module.lm[0].model.get_input_embeddings().weight.fill_(float("nan"))
    before = engine.module.head_loss.weight.detach().clone()
    with pytest.raises(FloatingPointError, match=r"of steps 1 to 3 are not fin.*learning_rate"):
        train(engine, settings, 5)
    assert torch.equal(engine.module.head_loss.weight, before)


@of_zero_3
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"zero_stage": 3}])
def test_a_target_with_adapters_trains_them_alone_and_is_exported_merged(
    changes, process_group, tmp_path
):
    pytest.importorskip("peft")
    settings = TrainSettings(lora=LoraSettings(rank=4), learning_rate=1e-2, **changes)
    engine = start_engine(settings)
    losses = [metrics.loss for metrics in train(engine, settings, 6)]
    assert len(set(losses)) == 6
    plain = AutoModelForCausalLM.from_config(tiny_config("llama", VOCAB))
    save_model(engine, str(tmp_path / "model"), rank=0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert {*loaded.state_dict()} == {*plain.state_dict()}
    torch.manual_seed(0)
    first = AutoModelForCausalLM.from_config(tiny_config("llama", VOCAB)).state_dict()
    changed = {name for name, w in loaded.state_dict().items() if not torch.equal(w, first[name])}
    assert changed
    assert all("_proj" in name for name in changed)
    if settings.zero_stage == 3:  # its hooks are on the layers before they were merged
        return
    (batch,) = build_micro_batches(random_rows(1), Packing(40, 1, True))
    ids = torch.from_numpy(batch.token_ids).long()
    engine.module.eval()
    loaded.eval()
    merged = engine.module.lm[0].hidden_states(ids)
    torch.testing.assert_close(loaded.base_model(ids).last_hidden_state, merged)


def test_training_with_offload_and_gradient_checkpointing_gives_the_same_losses(process_group):
    runs = []
    for changes in ({}, {"offload": True}, {"gradient_checkpointing": True}):
        settings = TrainSettings(learning_rate=1e-2, **changes)
        runs.append([metrics.loss for metrics in train(start_engine(settings), settings, 4)])
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)
    assert runs[2] == pytest.approx(runs[0], rel=1e-5)


@of_zero_3
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_in_bfloat16_every_zero_stage_learns_what_float32_does(zero_stage, process_group):
    settings = TrainSettings(learning_rate=1e-2, zero_stage=zero_stage)
    exact = [metrics.loss for metrics in train(start_engine(settings), settings, 4)]
    engine = start_engine(settings, dtype=torch.bfloat16)
    rough = train(engine, settings, 4)
    assert engine.module.head_loss.weight.dtype == torch.bfloat16
    assert [metrics.loss for metrics in rough] == pytest.approx(exact, rel=0.01)
    assert all(metrics.gradient_norm > 0 for metrics in rough)


def test_chance_in_a_step_is_its_own_so_that_a_run_goes_on_to_the_bit(process_group, tmp_path):
    settings = TrainSettings(learning_rate=1e-2, clm_weight=0.5)  # of any number of steps
    dropout = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
    uninterrupted = train(start_engine(settings, "gpt2", **dropout), settings, 4)
    other = train(start_engine(settings, "gpt2", **dropout), settings, 1, seed=1)
    assert other[0].loss != uninterrupted[0].loss
    engine = start_engine(settings, "gpt2", **dropout)
    train(engine, settings, 2)
    engine.save_checkpoint(str(tmp_path), tag="ds", save_latest=False)
    torch.manual_seed(7)
    engine = start_engine(settings, "gpt2", **dropout)
    engine.load_checkpoint(str(tmp_path), tag="ds")
    rest = train(engine, settings, 4, first_step=2)
    assert [metrics.loss for metrics in rest] == [metrics.loss for metrics in uninterrupted[2:]]


def test_bits_per_byte_are_those_of_the_model_librarys_own_loss(process_group):
    settings = TrainSettings()
    engine = start_engine(settings)
    (step,) = make_steps(1)
    model, nats, num_bytes = engine.module.lm[0].model, 0.0, 0
    rows = random_rows(6, 0)
    bytes_of = np.arange(VOCAB) % 5
    for row in np.split(rows.token_ids, np.cumsum(rows.lengths)[:-1]):
        ids = torch.from_numpy(row).long()[None]
        if len(row) > 1:
            nats += model(input_ids=ids, labels=ids).loss.item() * (len(row) - 1)
        num_bytes += int(bytes_of[row[1:]].sum())
    found = measure_bits_per_byte(engine, step.batches, bytes_of)
    assert found == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert engine.module.training


@pytest.mark.parametrize("is_tied", [False, True])
def test_flops_are_6_a_token_and_weight_and_those_of_attention_within_rows(is_tied, process_group):
    engine = start_engine(TrainSettings(), tie_word_embeddings=is_tied)
    (step,) = make_steps(1)
    rows = random_rows(6, 0)
    tokens = float((rows.lengths - 1).sum())
    model = engine.module.lm[0].model
    matrices = sum(p.numel() for p in model.parameters())
    if not is_tied:
        matrices -= model.get_input_embeddings().weight.numel()
    attention = 6 * 2 * 32 * int((rows.lengths.astype(np.int64) ** 2).sum())
    padding = sum(batch.token_ids.size for batch in step.batches) - int(rows.lengths.sum())
    found = ThroughputMeter(engine).measure(step.batches, tokens, 0.5)
    expected = 6 * matrices * tokens + attention
    assert found["flops_per_second"] * 0.5 == pytest.approx(expected, abs=6 * 2 * 32 * padding)
    assert found["tokens_per_second"] == 2 * tokens
    assert found["mfu"] is None  # the peak of a CPU is unknown
    assert found["memory_gib"] > 0.1


def test_frozen_weights_cost_4_flops_a_token_and_heads_count_at_their_own_width(process_group):
    engine = start_engine(TrainSettings(lora=LoraSettings(rank=4)), head_dim=8)
    size = ThroughputMeter(engine).size
    model = engine.module.lm[0].model
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < size.trained == adapters < size.weights / 4
    assert size.attention == 2 * 2 * 8  # layers, heads, width of a head; the model's width is 32
    forward = size.count_forward(tokens=100, squares=3000)
    assert forward == 2 * size.weights * 100 + 2 * size.attention * 3000
    training = size.count_training(tokens=100, squares=3000)
    assert training == 3 * forward - 2 * (size.weights - adapters) * 100


def test_waiting_for_data_is_measured(process_group):
    settings, seen = TrainSettings(), []

    def slowly():
        for step in make_steps(2):
            time.sleep(0.2)
            yield step

    objective = Objective(0.5, 1.0, 2, ("a", "b"))
    engine = start_engine(settings)
    train_steps(engine, slowly(), objective, first_step=0, num_workers=1, after_step=seen.append)
    assert all(0.2 <= metrics.wait_seconds < metrics.seconds for metrics in seen)
