"""The cost model: laws that hold for all assumptions, and figures counted by hand."""

import math
import re
from dataclasses import replace

import pytest

from rayfuse.config.overrides import RecipeError
from rayfuse.config.plan import PlanSettings, SizeSettings
from rayfuse.plan.command import list_assumptions
from rayfuse.plan.cost import RunPlan, make_plan
from rayfuse.plan.estimate import GIB, Work, estimate_steps
from rayfuse.plan.inputs import PlanInputs, read_example, read_inputs
from rayfuse.plan.model_size import size_from_config, size_from_settings


def read(*overrides: str) -> PlanInputs:
    return read_inputs(read_example("fusellm", list(overrides)), is_example=True)


def plan(*overrides: str) -> RunPlan:
    return make_plan(read(*overrides))


def line(found: RunPlan, title: str) -> Work:
    (work,) = [item for item in found.work if item.title == title]
    return work


def test_the_run_of_the_paper_equals_a_count_by_hand():
    """Llama-2 7B over 1.8 billion tokens in rows of 2,048, on L4s at 45 % of 121 Tflop/s."""
    found = plan()
    multiplied = 6_738_415_616 - 32_000 * 4096
    flops = 2 * multiplied + 2 * 32 * 4096 * 2048
    work = line(found, "capture llama-2")
    assert work.gpu is not None
    assert work.gpu.flops == pytest.approx(1.8e9 * flops)
    cost = found.costs["capture llama-2"]["L4"]
    computing = 1.8e9 * flops / (121e12 * 0.45 * 0.97) / 3600
    starting = 8 * 10 / 60
    assert cost.hours == pytest.approx(computing + starting)
    assert cost.spot_dollars == pytest.approx((computing * 1.05 + starting) * 0.35)
    assert (work.tokens, work.shards) == (pytest.approx(1.8e9), 1800)
    assert work.stored_bytes == pytest.approx(1.8e9 * (5 + 10 * 1.4))
    trained = line(found, "train clm").gpu
    assert trained is not None
    assert trained.flops == pytest.approx(1.8e9 * 4 * flops)  # activations twice, by checkpointing
    assert estimate_steps(read()) == math.ceil(1.8e9 / 2048 / 128)
    assert found.chosen["capture llama-2"] == "L4"
    assert found.chosen["train fused"] == "H100"


def test_costs_but_for_start_up_are_proportional_to_the_tokens():
    small, large = plan("plan.start_minutes=0"), plan("plan.start_minutes=0", "plan.tokens=1e12")
    for title, costs in small.costs.items():
        for kind, cost in costs.items():
            assert large.costs[title][kind].hours == pytest.approx(cost.hours * 1e12 / 1.8e9)
    for work in small.work:
        if work.stage != "train":  # a model's size does not depend on its text
            ratio = line(large, work.title).stored_bytes / max(work.stored_bytes, 1)
            assert work.stage == "evaluate" or ratio == pytest.approx(1e12 / 1.8e9)
    assert any("held-out tokens are scored by every model" in warning for warning in large.warnings)


def test_gpus_that_take_turns_cost_as_many_times_the_hours():
    free, name = "plan.start_minutes=0", "capture llama-2"
    one, four = plan(free), plan(free, "sources.llama-2.gpus=4")
    assert four.costs[name]["L4"].hours == pytest.approx(4 * one.costs[name]["L4"].hours)
    parallel = plan(free, "sources.llama-2.gpus=4", "sources.llama-2.backend=vllm")
    assert parallel.costs[name]["L4"].hours == pytest.approx(one.costs[name]["L4"].hours)


UNUSED_SETTINGS = {
    "unpacked_ratio",  # the example has no files
    "align_tokens_per_core_second",  # its alignment is `min_edit_distance`
    "captured_bytes_per_draw",  # it draws nothing
}


@pytest.mark.parametrize(
    "name",
    [name for name, _ in list_assumptions(PlanSettings()) if name not in UNUSED_SETTINGS],
)
def test_every_assumption_can_be_overridden_and_changes_the_plan(name):
    value = dict(list_assumptions(PlanSettings()))[name]
    changed = plan("plan.tokens=1e12", f"plan.{name}={value * 0.5}")
    assert replace(changed, settings=PlanSettings()) != replace(
        plan("plan.tokens=1e12"), settings=PlanSettings()
    )


def test_every_assumption_documents_meaning_unit_and_source():
    for name, _ in list_assumptions(PlanSettings()):
        text = " ".join((PlanSettings.model_fields[name].description or "").split())
        assert " Source: " in text or name in ("tokens", "row_tokens"), name


@pytest.mark.parametrize(
    ("config", "given"),
    [
        ({"model_type": "llama"}, "llama-2"),  # transformers' defaults are Llama 7B's
        (
            {
                "model_type": "mpt",
                "d_model": 4096,
                "n_heads": 32,
                "n_layers": 32,
                "max_seq_len": 2048,
                "vocab_size": 50432,
                "no_bias": True,
            },
            "mpt",
        ),
    ],
)
def test_sizes_of_the_example_are_those_of_their_configs(config, given):
    recipe = read_example("fusellm", [])
    assert size_from_config(config) == size_from_settings(recipe.plan.models[given])


def test_a_size_alone_has_the_shape_of_a_llama():
    size = size_from_settings(SizeSettings(parameters=6.7e9))
    assert (size.layers, size.width) == (32, 4096)


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (
            ["sources.mpt.accelerator_type=T4", "sources.mpt.dtype=float16"],
            "more than a T4 has; kinds that fit: L4, A10G",
        ),
        (["sources.mpt.accelerator_type=B9"], "accelerator_type B9, which is not in plan.gpus"),
        (["plan.models.mpt.parameters=2e11"], "capture mpt needs .* more than any kind of GPU"),
        (["plan.models.target.parameters=1e11"], "train fused needs .* raise train.num_workers"),
        (["sources.mpt.gpus=0"], "source mpt has gpus: 0 and will run on CPUs"),
        (["sources.mpt.max_actors=2000"], "2000 actors for 1800 shards"),
        (["train.checkpoint_every_steps=10000"], "a failure restarts it from step 0"),
        (["train.rows_per_step=100000"], "training has .* is few; lower train.rows_per_step to"),
        (
            ["fusion=default", "train.publish=best", "train.validate_every_steps=1000000"],
            "publish is best, but .* set train.validate_every_steps to",
        ),
        (["plan.tokens=1e12"], "held-out tokens are scored by every model"),
    ],
)
def test_a_wasteful_or_failing_setting_gives_a_warning(overrides, warning):
    assert plan().warnings == ()
    assert any(re.search(warning, found) for found in plan(*overrides).warnings)


def test_a_model_fits_with_more_memory_or_more_gpus():
    def fits(*overrides: str) -> list[str]:
        costs = plan("plan.models.mpt.parameters=3e10", *overrides).costs["capture mpt"]
        return [kind for kind, cost in costs.items() if cost.fits]

    assert fits() == ["H100", "H200"]  # 60 GB of weights
    both = ("sources.mpt.backend=vllm", "sources.mpt.gpus=2")
    assert fits(*both) == ["A100", "H100", "H200"]
    assert fits("sources.mpt.gpus=0.5") == ["H200"]


def test_a_gpu_without_bfloat16_is_selected_only_for_another_dtype():
    small = "plan.models.mpt.parameters=1e9"
    assert plan(small).costs["capture mpt"]["T4"].fits
    assert plan(small).chosen["capture mpt"] == "L4"
    cheap = plan(small, "sources.mpt.dtype=float16", "plan.gpus.T4.spot_dollars=0.01")
    assert cheap.chosen["capture mpt"] == "T4"


def test_training_shares_memory_as_zero_does():
    def need(*overrides: str) -> float:
        gpu = line(plan(*overrides), "train fused").gpu
        assert gpu is not None
        return gpu.memory_bytes

    weights = 6_738_415_616
    stages = [need(f"train.zero_stage={stage}") for stage in range(4)]
    shared = [12 * 7 / 8, 2 * 7 / 8, 2 * 7 / 8]
    for stage, part in enumerate(shared):
        assert stages[stage] - stages[stage + 1] == pytest.approx(part * weights)
    assert need("train.offload=true") == pytest.approx(stages[2] - 12 / 8 * weights)
    assert need("train.gradient_checkpointing=false") > stages[2] + 5 * GIB
    assert need("train.lora={rank: 8}") < 2.3 * weights


def test_completed_work_has_no_cost():
    inputs = read()
    before = make_plan(inputs)
    inputs.done = {("capture", "mpt"): 900, ("train", "clm"): 1}
    after = make_plan(inputs)
    assert line(after, "capture mpt").done == 0.5
    assert after.costs["train clm"]["H100"].hours == 0
    start = 8 * 10 / 60
    everything = before.costs["capture mpt"]["L4"].hours - start
    assert after.costs["capture mpt"]["L4"].hours == pytest.approx(everything / 2 + start)


def test_a_measured_rate_replaces_an_assumed_one():
    found = make_plan(read("plan.start_minutes=0"), {("capture mpt", "L4"): 1e5})
    assert found.costs["capture mpt"]["L4"].hours == pytest.approx(1.8e9 / 1e5 / 3600)
    assert (
        found.costs["capture mpt"]["A10G"]
        == plan("plan.start_minutes=0").costs["capture mpt"]["A10G"]
    )


def test_an_unknown_example_is_refused_with_the_known_ones():
    assert read_example("fusellm", ["plan.tokens=1"]).plan.tokens == 1
    assert read_example("fusellm", []).plan.tokens == 1.8e9
    with pytest.raises(RecipeError, match="there is no example 'x'; use fusellm"):
        read_example("x", [])
