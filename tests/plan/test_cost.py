"""The cost model: laws that hold whatever is assumed, and figures counted by hand."""

import copy
import math
import re
from dataclasses import replace

import pytest

from rayfuse.config.overrides import RecipeError
from rayfuse.config.plan import PlanSettings, SizeSettings
from rayfuse.plan.cost import Plan, make_plan
from rayfuse.plan.estimate import count_steps
from rayfuse.plan.examples import EXAMPLES, read_example
from rayfuse.plan.inputs import Setup, read_setup
from rayfuse.plan.memory import GIB
from rayfuse.plan.model_size import size_from_config, size_from_settings
from rayfuse.plan.show import list_assumptions
from rayfuse.plan.work import Work


def read(*overrides: str) -> Setup:
    return read_setup(read_example("fusellm", list(overrides)), is_example=True)


def plan(*overrides: str) -> Plan:
    return make_plan(read(*overrides))


def line(found: Plan, title: str) -> Work:
    (work,) = [each for each in found.work if each.title == title]
    return work


def test_the_papers_own_run_by_hand():
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
    assert count_steps(read()) == math.ceil(1.8e9 / 2048 / 128)
    assert found.chosen["capture llama-2"] == "L4"
    assert found.chosen["train fused"] == "H100"


def test_a_trillion_tokens_cost_in_proportion_whatever_needs_no_start():
    small, large = plan("plan.start_minutes=0"), plan("plan.start_minutes=0", "plan.tokens=1e12")
    for title, costs in small.costs.items():
        for kind, cost in costs.items():
            assert large.costs[title][kind].hours == pytest.approx(cost.hours * 1e12 / 1.8e9)
    for work in small.work:
        if work.stage != "train":  # a model is as large whatever it has read
            ratio = line(large, work.title).stored_bytes / max(work.stored_bytes, 1)
            assert work.stage == "evaluate" or ratio == pytest.approx(1e12 / 1.8e9)
    assert any("held-out tokens are scored by every model" in each for each in large.warnings)


SETTINGS_OF_NO_USE_HERE = {
    "unpacked_ratio",  # the example has no files
    "align_tokens_per_core_second",  # its alignment is `min_edit_distance`
    "captured_bytes_per_draw",  # it draws nothing
}


@pytest.mark.parametrize(
    "name",
    [name for name, _ in list_assumptions(PlanSettings()) if name not in SETTINGS_OF_NO_USE_HERE],
)
def test_every_assumption_can_be_overridden_and_changes_the_plan(name):
    value = dict(list_assumptions(PlanSettings()))[name]
    changed = plan("plan.tokens=1e12", f"plan.{name}={value * 0.5}")
    assert replace(changed, settings=PlanSettings()) != replace(
        plan("plan.tokens=1e12"), settings=PlanSettings()
    )


def test_assumptions_say_what_they_are_in_which_unit_and_from_where():
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
        (["sources.mpt.accelerator_type=T4"], "more than T4 has; kinds that have it: L4, A10G"),
        (["sources.mpt.accelerator_type=T4"], "T4, which has no bfloat16: set sources.mpt.dtype"),
        (["sources.mpt.accelerator_type=B9"], "asks for B9, of which plan.gpus knows nothing"),
        (["plan.models.mpt.parameters=2e11"], "capture mpt needs .* more than any kind of GPU"),
        (["plan.models.target.parameters=1e11"], "train fused needs .* raise train.num_workers"),
        (["sources.mpt.gpus=0"], "source mpt has gpus: 0 and will run on CPUs"),
        (["sources.mpt.max_actors=2000"], "2000 actors for 1800 shards"),
        (["train.checkpoint_every_steps=10000"], "whoever dies begins anew"),
        (["plan.tokens=1e12"], "held-out tokens are scored by every model"),
    ],
)
def test_what_looks_wrong_is_said(overrides, warning):
    assert plan().warnings == ()
    assert any(re.search(warning, each) for each in plan(*overrides).warnings)


def test_what_does_not_fit_a_kind_fits_where_there_is_more_memory_or_more_gpus():
    def fits(*overrides: str) -> list[str]:
        costs = plan("plan.models.mpt.parameters=3e10", *overrides).costs["capture mpt"]
        return [kind for kind, cost in costs.items() if cost.fits]

    assert fits() == ["H100", "H200"]  # 60 GB of weights
    both = ("sources.mpt.backend=vllm", "sources.mpt.gpus=2")
    assert fits(*both) == ["A100", "H100", "H200"]
    assert fits("sources.mpt.gpus=0.5") == ["H200"]


def test_no_kind_without_bfloat16_is_chosen_unless_the_recipe_does_without():
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


def test_what_is_done_costs_no_more():
    setup = read()
    before = make_plan(setup)
    setup.done = {("capture", "mpt"): 900, ("train", "clm"): 1}
    after = make_plan(setup)
    assert line(after, "capture mpt").done == 0.5
    assert after.costs["train clm"]["H100"].hours == 0
    start = 8 * 10 / 60
    whole = before.costs["capture mpt"]["L4"].hours - start
    assert after.costs["capture mpt"]["L4"].hours == pytest.approx(whole / 2 + start)


def test_a_measured_rate_goes_before_an_assumed_one():
    found = make_plan(read("plan.start_minutes=0"), {("capture mpt", "L4"): 1e5})
    assert found.costs["capture mpt"]["L4"].hours == pytest.approx(1.8e9 / 1e5 / 3600)
    assert (
        found.costs["capture mpt"]["A10G"]
        == plan("plan.start_minutes=0").costs["capture mpt"]["A10G"]
    )


def test_an_example_is_never_changed_and_one_that_is_not_there_is_named():
    before = copy.deepcopy(EXAMPLES)
    read_example("fusellm", ["plan.tokens=1", "sources.mpt.gpus=0"])
    assert before == EXAMPLES
    with pytest.raises(RecipeError, match="there is no example 'x'; use fusellm"):
        read_example("x", [])
